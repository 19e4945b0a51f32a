"""Which nodes a deployment has and what is known of them: deploy.toml, facts, paths, state."""
