"""pLSTM-Vis on ImageNet-1k as published: pretraining at 192 x 192, then fine-tuning at 224 x 224.

--data is a folder with train/<class>/*.JPEG and val/<class>/*.JPEG. A run that was stopped goes on
with the same command. With --plan nothing is read or trained: sizes and steps are printed.
"""

import argparse
import dataclasses
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxrec.errors import UserError
from jaxrec.models.plstm_vision import VISION_B, VISION_S, VISION_T, PLSTMVisionConfig
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.images import Augmentation, ImageFolder
from jaxrec.training.images import ImageSettings, ImageSteps, train_images

MODELS = {"T": VISION_T, "S": VISION_S, "B": VISION_B}
PRETRAINED = {
    "T": ImageSettings(),
    "S": ImageSettings(epochs=400),
    "B": ImageSettings(
        epochs=400, optimizer=dataclasses.replace(ImageSettings().optimizer, learning_rate=3e-3)
    ),
}
FINE_TUNED = ImageSettings(
    epochs=20,
    batch=512,
    loss="one",
    smoothing=0.1,
    repeats=1,
    save_epochs=1,
    optimizer=OptimizerConfig(
        learning_rate=1e-5, beta2=0.999, weight_decay=0.1, clip_norm=1.0, final_fraction=0.1
    ),
)
IMAGES = 1_281_167


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="T")
    parser.add_argument("--data", type=Path, help="folder with train and val")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument(
        "--fine-tune", type=Path, help="the pretraining run that this one begins with"
    )
    parser.add_argument("--mesh", default="data=1", help="devices, such as data=8")
    parser.add_argument("--workers", type=int, default=32, help="threads that read images")
    parser.add_argument("--plan", action="store_true", help="print sizes, read and train nothing")
    options = parser.parse_args()
    config, settings, size = published(options.model, fine_tune=options.fine_tune is not None)
    settings = dataclasses.replace(settings, mesh=options.mesh)
    if options.plan:
        print(json.dumps(plan(config, settings, size), indent=2))
        return
    if options.data is None or options.out is None:
        parser.error("--data and --out are needed to train")
    start = drawn_gates if options.fine_tune is None else parameters_of(options.fine_tune)
    augmentation: Augmentation = "three" if options.fine_tune is None else "randaugment"
    try:
        train, valid = (
            ImageFolder(
                options.data / part, size, augmentation=augmentation, workers=options.workers
            )
            for part in ("train", "val")
        )
        results = train_images(
            config, train, valid, settings, options.out, start=start, stream=sys.stderr
        )
    except UserError as error:
        parser.error(str(error))
    print(json.dumps({"accuracy": results.accuracy, "steps": results.steps}))


def drawn_gates(steps: ImageSteps) -> Any:
    """Fresh parameters in which gates read their input from the start: normal weights with variance
    2 / (5 inputs), where those of the library begin at zero, as in the other published runs.
    """

    def drawn(path: Any, leaf: jax.Array) -> jax.Array:
        names = [str(key.key) for key in path]
        if names[-1] != "weight" or {"query", "key", "value"} & set(names):
            return leaf
        key = jax.random.fold_in(jax.random.key(1), zlib.crc32("/".join(names).encode()))
        weights = (2 / (5 * leaf.shape[-1])) ** 0.5 * jax.random.normal(key, leaf.shape)
        return jax.device_put(weights, leaf.sharding)

    return jax.tree_util.tree_map_with_path(drawn, steps.init()["params"])


def parameters_of(run: Path) -> Callable[[ImageSteps], Any]:
    """What reads the newest parameters of a run."""

    def start(steps: ImageSteps) -> Any:
        with Checkpoints(run / "checkpoints", read_only=True) as saved:
            last = saved.latest_step()
            if last is None:
                raise UserError(f"--fine-tune: {run} holds no checkpoint.")
            return saved.restore_params(last, steps.abstract["params"])

    return start


def published(name: str, *, fine_tune: bool) -> tuple[PLSTMVisionConfig, ImageSettings, int]:
    """The model, which keeps the positions of 192 x 192 and resizes them; the run; its images."""
    return MODELS[name], FINE_TUNED if fine_tune else PRETRAINED[name], 224 if fine_tune else 192


def plan(config: PLSTMVisionConfig, settings: ImageSettings, size: int) -> dict[str, Any]:
    """What a run is, from shapes alone."""
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "image": size,
        "steps": settings.epochs * (IMAGES // settings.batch),
        "settings": dataclasses.asdict(settings),
    }


if __name__ == "__main__":
    main()
