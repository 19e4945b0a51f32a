"""What builder, index and deploy share: errors, console, files, settings, tables, pins. No program's own work belongs here."""
