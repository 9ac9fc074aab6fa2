"""Building blocks of the models, defined with flax.nnx: shapes in, shapes out, calling `jpd.ops`."""
