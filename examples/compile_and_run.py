"""Compile a PyTorch InternImage into a folder that runs without PyTorch.

    python examples/compile_and_run.py [--variant internimage_t] [--checkpoint FILE] [--image FILE]

Without --checkpoint the weights are random, and the predicted classes mean nothing. To measure
the speed, use `dcnv3-tvm bench encoder`.
"""

import argparse
import sys
from pathlib import Path

import dcnv3_tvm as dt
from dcnv3_tvm import frontend
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.runtime import top_k
from dcnv3_tvm.verify.compare import compare
from dcnv3_tvm.verify.random_weights import randomize_


def sample_image() -> Path:
    """Return an image that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    return Path(load_sample_images().filenames[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", default="internimage_t", help="a name of `dcnv3-tvm models`")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: random)")
    parser.add_argument("--image", type=Path, help="image file (default: scikit-learn's china.jpg)")
    parser.add_argument("--output", type=Path, help="folder (default: build/<variant>)")
    arguments = parser.parse_args()
    folder = arguments.output or Path("build") / arguments.variant

    with Progress("compile") as progress:
        # Step 1. Create the PyTorch model. A fresh InternImage does not deform anything (its offset
        # layers are zero), so without a checkpoint use random weights that do.
        progress.step("build PyTorch model")
        model = frontend.create_model(arguments.variant, checkpoint=arguments.checkpoint)
        if arguments.checkpoint is None:
            randomize_(model)

        # Step 2. Import it into Relax, TVM's graph language. The example fixes the image size;
        # dynamic_batch=True and dynamic_size=True leave it dynamic.
        progress.step("import into Relax")
        resolution = model.config.resolution
        imported = frontend.import_model(model, example=(1, 3, resolution, resolution))

        # Step 3. Compile it for this machine and save the result, the artifact.
        compiled = dt.compile_model(imported, on_phase=progress.step)
    compiled.save(folder)

    # Step 4. Load the artifact. This and the next step need neither PyTorch nor a compiler.
    encoder = dt.load(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {arguments.variant} for {encoder.metadata.target.slug}, {size:.1f} MB")

    # Step 5. Run it on an image: classify it, and compute the feature maps of the four stages.
    image = encoder.preprocess(arguments.image or sample_image())
    classes, probabilities = top_k(encoder(image), k=3, labels=encoder.metadata.labels)
    for name, probability in zip(classes[0], probabilities[0], strict=True):
        print(f"{name}: probability {probability:.2f}")
    for index, feature in enumerate(encoder.features(image)):
        print(f"feature map {index}: {feature.shape}")

    # Step 6. Compare every output with the PyTorch model in float64: the largest absolute error,
    # relative to the largest absolute value.
    differences = compare(encoder, model, image)
    for difference in differences:
        print(f"{difference.output}: relative error {difference.maximum:.1e}")
    passed = all(difference.within("float32") for difference in differences)
    print("all outputs are within the tolerance" if passed else "an output is NOT correct")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
