"""Parts of bench/serve_gpu.sh: real vLLM and Ray on the GPUs of a machine without a network. The nodes are namespaces."""
