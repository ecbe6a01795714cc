"""Apache Beam: the data-parallel stages as pipelines whose element is a shard."""

import logging

# Beam warns of a cloud library that nothing here uses, at every import.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
