"""All nodes at once over SSH: connections, commands, jobs, files, tunnels, calls into `deploy.remote`."""
