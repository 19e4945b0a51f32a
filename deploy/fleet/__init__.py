"""Work on all nodes in parallel over SSH: connections, commands, jobs, files, tunnels, calls of `deploy.remote`."""
