-- A registry of schema 0001, written by hand: what an upgrade must be able to start from. Never change it.
-- SERIAL is INTEGER in SQLite.
CREATE TABLE tg_schema (version_num VARCHAR(32) NOT NULL, CONSTRAINT tg_schema_pkc PRIMARY KEY (version_num));
INSERT INTO tg_schema VALUES ('0001');
CREATE TABLE tg_entities (
    id VARCHAR(80) NOT NULL, kind VARCHAR(16) NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL, at VARCHAR(32) NOT NULL,
    CONSTRAINT pk_tg_entities PRIMARY KEY (id)
);
CREATE INDEX ix_tg_entities_kind ON tg_entities (kind);
CREATE TABLE tg_edges (
    child VARCHAR(80) NOT NULL, parent VARCHAR(80) NOT NULL, role VARCHAR(24) NOT NULL,
    CONSTRAINT pk_tg_edges PRIMARY KEY (child, parent, role),
    CONSTRAINT fk_tg_edges_child FOREIGN KEY (child) REFERENCES tg_entities (id),
    CONSTRAINT fk_tg_edges_parent FOREIGN KEY (parent) REFERENCES tg_entities (id)
);
CREATE INDEX ix_tg_edges_parent ON tg_edges (parent);
CREATE TABLE tg_versions (
    adapter VARCHAR(80) NOT NULL, name VARCHAR(100) NOT NULL, number INTEGER NOT NULL, state VARCHAR(16) NOT NULL,
    verdict VARCHAR(16), override TEXT,
    CONSTRAINT pk_tg_versions PRIMARY KEY (adapter),
    CONSTRAINT uq_tg_versions_number UNIQUE (name, number),
    CONSTRAINT fk_tg_versions_adapter FOREIGN KEY (adapter) REFERENCES tg_entities (id)
);
CREATE UNIQUE INDEX uq_tg_versions_production ON tg_versions (name) WHERE state = 'production';
CREATE TABLE tg_files (
    adapter VARCHAR(80) NOT NULL, path VARCHAR(400) NOT NULL, part INTEGER NOT NULL, hash VARCHAR(80) NOT NULL,
    size BIGINT NOT NULL,
    CONSTRAINT pk_tg_files PRIMARY KEY (adapter, path, part),
    CONSTRAINT fk_tg_files_adapter FOREIGN KEY (adapter) REFERENCES tg_entities (id)
);
CREATE INDEX ix_tg_files_hash ON tg_files (hash);
CREATE TABLE tg_aliases (
    name VARCHAR(100) NOT NULL, alias VARCHAR(100) NOT NULL, adapter VARCHAR(80) NOT NULL,
    CONSTRAINT pk_tg_aliases PRIMARY KEY (name, alias),
    CONSTRAINT fk_tg_aliases_adapter FOREIGN KEY (adapter) REFERENCES tg_entities (id)
);
CREATE TABLE tg_base_names (
    name VARCHAR(400) NOT NULL, base VARCHAR(80) NOT NULL,
    CONSTRAINT pk_tg_base_names PRIMARY KEY (name),
    CONSTRAINT fk_tg_base_names_base FOREIGN KEY (base) REFERENCES tg_entities (id)
);
CREATE TABLE tg_superseded (
    old VARCHAR(80) NOT NULL, new VARCHAR(80) NOT NULL, who TEXT NOT NULL, at VARCHAR(32) NOT NULL, why TEXT NOT NULL,
    CONSTRAINT pk_tg_superseded PRIMARY KEY (old),
    CONSTRAINT fk_tg_superseded_old FOREIGN KEY (old) REFERENCES tg_entities (id),
    CONSTRAINT fk_tg_superseded_new FOREIGN KEY (new) REFERENCES tg_entities (id)
);
CREATE TABLE tg_events (
    seq SERIAL NOT NULL, subject VARCHAR(80) NOT NULL, what TEXT NOT NULL, who TEXT NOT NULL, at VARCHAR(32) NOT NULL,
    why TEXT NOT NULL,
    CONSTRAINT pk_tg_events PRIMARY KEY (seq),
    CONSTRAINT fk_tg_events_subject FOREIGN KEY (subject) REFERENCES tg_entities (id)
);
CREATE INDEX ix_tg_events_subject ON tg_events (subject);
CREATE TABLE tg_pins (
    hash VARCHAR(80) NOT NULL, upload VARCHAR(40) NOT NULL, at VARCHAR(32) NOT NULL,
    CONSTRAINT pk_tg_pins PRIMARY KEY (hash, upload)
);
CREATE TABLE tg_settings (
    key VARCHAR(40) NOT NULL, value TEXT NOT NULL, CONSTRAINT pk_tg_settings PRIMARY KEY (key)
);
