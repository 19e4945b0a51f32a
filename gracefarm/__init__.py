"""What builder, index and deploy share: errors, console, files, settings. Nothing else belongs here."""
