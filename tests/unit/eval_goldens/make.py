"""Expected values for `test_eval_features.py`, made by the packages' own functions (run by hand, not by tests).

In an environment of its own, since these packages pin old versions of others:

    pip install clean-fid pytorch-fid torch torchvision pillow tensorflow-cpu
    python tests/unit/eval_goldens/make.py

`clean-fid` is cleanfid.resize.build_resizer("clean"), `pytorch-fid` what pytorch_fid.inception.InceptionV3.forward
hands to its first block, `adm` TensorFlow's ResizeBilinear op with the attributes it has in the graph that ADM's
evaluator runs (classify_image_graph_def.pb), followed by that graph's (x - 128) / 128. Every 23rd row and column is
kept. A package that is not there leaves its entries as they are in the file.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("resize.npz")
SIZES = (32, 256, 299, 400)
STEP = 23


def picture(size: int) -> np.ndarray:
    """A uint8 image (size, size, 3) with smooth parts, noise and hard black-white edges."""
    rng = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    smooth = 127 + 127 * np.sin(7 * x[..., None] + np.array([0, 1, 2])) * np.cos(5 * y[..., None])
    smooth[(x > 0.5) & (y > 0.5)] = rng.integers(0, 256, (size, size, 3))[(x > 0.5) & (y > 0.5)]
    smooth[(x < 0.4) & (y > 0.6)] = 255.0 * ((np.indices((size, size)).sum(0) // 3) % 2)[(x < 0.4) & (y > 0.6), None]
    return smooth.round().clip(0, 255).astype(np.uint8)


def clean_fid(image: np.ndarray) -> np.ndarray:
    from cleanfid.resize import build_resizer

    return build_resizer("clean")(image)


def pytorch_fid(image: np.ndarray) -> np.ndarray:
    import torch
    from pytorch_fid.inception import InceptionV3

    network = InceptionV3.__new__(InceptionV3)  # its forward without its weights: the first block is the identity
    torch.nn.Module.__init__(network)
    network.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    network.output_blocks, network.last_needed_block = [0], 0
    network.resize_input = network.normalize_input = True
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255  # torchvision's ToTensor
    return network(x)[0][0].permute(1, 2, 0).numpy()


def adm(image: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    x = tf.constant(image[None].astype(np.float32))
    x = tf.raw_ops.ResizeBilinear(images=x, size=[299, 299], align_corners=False, half_pixel_centers=False)
    return ((x - 128.0) * 0.0078125)[0].numpy()


def main() -> None:
    out = dict(np.load(FILE)) if FILE.exists() else {}
    for name, function in (("clean-fid", clean_fid), ("pytorch-fid", pytorch_fid), ("adm", adm)):
        try:
            out |= {f"{name}-{n}": function(picture(n))[::STEP, ::STEP].astype(np.float32) for n in SIZES}
        except ImportError as error:
            print(f"{name}: {error}; left as it is")
    np.savez_compressed(FILE, **out)
    print({key: value.shape for key, value in sorted(out.items())})


if __name__ == "__main__":
    main()
