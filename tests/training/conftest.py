"""Data that several tests of training share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clip art in shards, with embeddings of as many numbers as the examples for DALLE2-pytorch say."""
    import numpy as np

    from eclosion.data.clipart import ClipartSource
    from eclosion.sharding import shard

    folder = tmp_path_factory.mktemp("shards")
    samples = ClipartSource().open()
    embeddings = np.random.default_rng(0).standard_normal((len(samples), 1280), np.float32)
    np.save(folder / "embeddings.npy", embeddings)
    shard(samples, folder / "clipart", samples_per_shard=64, image_embeddings=folder / "embeddings.npy")
    return folder / "clipart"
