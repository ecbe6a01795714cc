"""Apache Beam: the data-parallel stages as pipelines whose element is a shard."""

import logging

# At every import Beam warns about a cloud library that nothing here uses.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
