"""From a list of GH200 nodes to a served model."""
