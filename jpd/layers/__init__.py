"""Building blocks of models, defined with flax.nnx: shapes in, shapes out, calling `jpd.ops`."""
