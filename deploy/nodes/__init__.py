"""The nodes of a deployment: deploy.toml, facts, paths, state, secrets."""
