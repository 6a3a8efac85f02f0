import jax.numpy as jnp

from experiments import settled


def test_the_host_looks_at_the_end_of_the_loop():
    """A loop whose length the compiler knew would not have it wait."""
    text = settled.loop.lower(jnp.float32(4)).compile().as_text()
    assert " while(" in text
    assert "known_trip_count" not in text
    assert settled.loop(jnp.float32(4)) == 4
    settled.settle()
