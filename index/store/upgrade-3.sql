ALTER TABLE record ADD COLUMN project TEXT NOT NULL DEFAULT '';
ALTER TABLE record ADD COLUMN wheels TEXT NOT NULL DEFAULT '';
UPDATE record SET project = lower(replace(replace(recipe, '_', '-'), '.', '-'));
ALTER TABLE mirrored ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE mirrored ADD COLUMN withdrawn TEXT;
CREATE VIEW public_record AS SELECT * FROM record
    WHERE NOT EXISTS (SELECT 1 FROM file WHERE file.build = record.id)
    OR EXISTS (SELECT 1 FROM file WHERE file.build = record.id AND file.hidden = 0);
