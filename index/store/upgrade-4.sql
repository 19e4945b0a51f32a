-- An early version 3 had this table with one lock per set.
DROP TABLE IF EXISTS pin;
CREATE TABLE pin (
    set_name TEXT NOT NULL REFERENCES release_set (name),
    lock TEXT NOT NULL,
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    link INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (set_name, lock, project, version)
) WITHOUT ROWID;
