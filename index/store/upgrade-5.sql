CREATE TABLE matrix (
    name TEXT PRIMARY KEY,
    projects TEXT NOT NULL,
    document_sha256 TEXT NOT NULL,
    document_size INTEGER NOT NULL,
    updated TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE certificate (
    digest TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    wheel_sha256 TEXT NOT NULL,
    document_sha256 TEXT NOT NULL,
    document_size INTEGER NOT NULL,
    updated TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX certificate_wheel ON certificate (wheel_sha256);
