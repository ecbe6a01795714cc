"""Apache Beam: the data-parallel stages as pipelines whose element is a shard."""
