CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE project (
    name TEXT PRIMARY KEY,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived', 'deprecated', 'quarantined')),
    reason TEXT NOT NULL DEFAULT '',
    hosted INTEGER NOT NULL DEFAULT 1,
    serial INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE file (
    id INTEGER PRIMARY KEY,
    filename TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL REFERENCES project (name),
    version TEXT NOT NULL,
    release TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('bdist_wheel', 'sdist')),
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    metadata_sha256 TEXT,
    provenance_sha256 TEXT,
    requires_python TEXT,
    summary TEXT NOT NULL DEFAULT '',
    uploaded TEXT NOT NULL,
    actor TEXT NOT NULL,
    channel TEXT NOT NULL DEFAULT 'release' CHECK (channel IN ('release', 'nightly')),
    hidden INTEGER NOT NULL DEFAULT 0,
    yanked TEXT,
    deleted TEXT,
    lost INTEGER NOT NULL DEFAULT 0,
    cuda TEXT,
    facts TEXT NOT NULL DEFAULT '{}',
    build TEXT,
    variant TEXT,
    defects TEXT NOT NULL DEFAULT ''
);
CREATE INDEX file_project ON file (project);
CREATE INDEX file_sha256 ON file (sha256);
CREATE INDEX file_build ON file (build);
CREATE TABLE release_set (
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('staged', 'published', 'dropped')),
    preview TEXT NOT NULL UNIQUE,
    channel TEXT NOT NULL DEFAULT 'release',
    matrix TEXT NOT NULL DEFAULT '[]',
    created TEXT NOT NULL,
    published TEXT,
    without TEXT NOT NULL DEFAULT '[]'
) WITHOUT ROWID;
CREATE TABLE member (
    set_name TEXT NOT NULL REFERENCES release_set (name),
    file_id INTEGER NOT NULL REFERENCES file (id),
    PRIMARY KEY (set_name, file_id)
) WITHOUT ROWID;
CREATE INDEX member_file ON member (file_id);
CREATE TABLE mirrored (
    set_name TEXT NOT NULL REFERENCES release_set (name),
    filename TEXT NOT NULL,
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    kind TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    metadata_sha256 TEXT,
    requires_python TEXT,
    uploaded TEXT NOT NULL,
    url TEXT,
    lost INTEGER NOT NULL DEFAULT 0,
    withdrawn TEXT,
    defects TEXT NOT NULL DEFAULT '',
    serves_metadata INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (set_name, filename)
) WITHOUT ROWID;
CREATE INDEX mirrored_sha256 ON mirrored (sha256);
CREATE TABLE record (
    id TEXT PRIMARY KEY,
    project TEXT NOT NULL DEFAULT '',
    wheels TEXT NOT NULL DEFAULT '',
    recipe TEXT NOT NULL DEFAULT '',
    version TEXT NOT NULL DEFAULT '',
    stack TEXT NOT NULL DEFAULT '',
    target TEXT NOT NULL DEFAULT '',
    outcome TEXT NOT NULL DEFAULT '',
    seconds REAL,
    cause TEXT NOT NULL DEFAULT '',
    finished TEXT NOT NULL DEFAULT '',
    document_sha256 TEXT,
    document_size INTEGER,
    log_sha256 TEXT,
    log_size INTEGER,
    updated TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE token (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL UNIQUE,
    project TEXT,
    set_name TEXT,
    created TEXT NOT NULL,
    expires TEXT,
    revoked TEXT,
    hashed TEXT,
    minted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE audit (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '{}'
);
CREATE TRIGGER audit_keeps BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TABLE pin (
    set_name TEXT NOT NULL REFERENCES release_set (name),
    lock TEXT NOT NULL,
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    link INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0,
    selection TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (set_name, lock, project, version)
) WITHOUT ROWID;
-- A build is as visible as its wheels: if all its wheels are hidden in staged sets, its record is hidden too.
CREATE VIEW public_record AS SELECT * FROM record
    WHERE NOT EXISTS (SELECT 1 FROM file WHERE file.build = record.id)
    OR EXISTS (SELECT 1 FROM file WHERE file.build = record.id AND file.hidden = 0);
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
CREATE TABLE variants_json (
    filename TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (filename, sha256)
) WITHOUT ROWID;
CREATE TABLE set_pylock (
    set_name TEXT PRIMARY KEY REFERENCES release_set (name),
    content BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE publisher (
    id INTEGER PRIMARY KEY,
    project TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('github', 'gitlab')),
    issuer TEXT NOT NULL,
    repository TEXT NOT NULL,
    workflow TEXT NOT NULL,
    environment TEXT NOT NULL DEFAULT '',
    repository_id TEXT,
    UNIQUE (project, kind, issuer, repository, workflow, environment)
);
CREATE TABLE minted (
    token_id INTEGER NOT NULL REFERENCES token (id) ON DELETE CASCADE,
    publisher_id INTEGER NOT NULL REFERENCES publisher (id) ON DELETE CASCADE,
    PRIMARY KEY (token_id, publisher_id)
) WITHOUT ROWID;
CREATE TABLE spent (digest TEXT PRIMARY KEY, expires TEXT NOT NULL) WITHOUT ROWID;
