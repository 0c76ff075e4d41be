"""A model of the distributed loss on a cluster, its report, and the model compared with real processes."""
