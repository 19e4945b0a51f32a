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
ALTER TABLE file ADD COLUMN variant TEXT;
ALTER TABLE file ADD COLUMN defects TEXT NOT NULL DEFAULT '';
ALTER TABLE mirrored ADD COLUMN defects TEXT NOT NULL DEFAULT '';
ALTER TABLE release_set ADD COLUMN without TEXT NOT NULL DEFAULT '[]';
ALTER TABLE pin ADD COLUMN selection TEXT NOT NULL DEFAULT '';
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
ALTER TABLE file ADD COLUMN provenance_sha256 TEXT;
ALTER TABLE token ADD COLUMN minted INTEGER NOT NULL DEFAULT 0;
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
