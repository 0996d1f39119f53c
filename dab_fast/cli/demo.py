"""The original and the accelerated DAB-DETR-R50 on one photo: the same boxes, the calls and the time of each.

Freshly initialised weights show nothing: Hugging Face zeroes the last box layer and puts all anchors in one place, so
that 300 equal boxes stand still whatever the decoder computes. Without a checkpoint every parameter is drawn anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional

import dab_fast
from dab_fast import accuracy, checkpoint
from dab_fast.bench import by_parts
from dab_fast.bench.by_parts import Part, Peer
from dab_fast.cli.inputs import InputError

SHORTER, LONGER = 800, 1333  # the usual resize of DETR: the shorter side to 800, the longer at most 1333
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones were trained

BUSY = 1.5  # times that vary by more than this factor between rounds say little
LEAST_ROUNDS = 3
STEP_BATCH, STEP_SIZE = 2, (480, 640)  # images of a training step, and their height and width
LEAST_MOVE_PX = 1.0  # the median box must move this far, or equal boxes say nothing about the decoder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What the demo measured."""

    image: str
    size: tuple[int, int]  # width, height in pixels after the resize
    tokens: int  # of the encoder's output
    weights: str
    device: str
    dtype: str
    compared: str  # which outputs the differences are between
    max_box_difference_px: float
    max_logit_difference: float
    original_box_error_px: float  # of the original under autocast against itself in float32; 0 in float32
    original_logit_error: float
    median_box_move_px: float  # from the learned anchors to the predicted boxes
    parts: dict[str, Part]  # by name, the whole model and the training step last
    step_size: tuple[int, int, int]  # images, width and height of the training step
    peers: dict[str, Peer]  # empty unless asked for
    rounds: int  # timed, of the fewest
    times_vary: float  # the slowest round over the fastest, of the worst of all
    stepped_aside: dict[str, dict[str, int]]  # module to reason to number of calls

    # In half precision ours is compared with the original in float32, where the original under autocast errs too.
    @property
    def allowed_box_difference_px(self) -> float:
        return accuracy.allowed(self.original_box_error_px, accuracy.DEMO_BOX_PX)

    @property
    def allowed_logit_difference(self) -> float:
        return accuracy.allowed(self.original_logit_error, accuracy.DEMO_LOGIT)

    @property
    def half(self) -> bool:
        return self.dtype != "float32"

    @property
    def verdict(self) -> str:
        if self.failures:
            return "NOT the same boxes"
        return f"the same boxes but for the rounding of {self.dtype}" if self.half else "the same boxes"

    @property
    def busy(self) -> bool:
        """Whether the machine had other work, so that the times say little."""
        return self.rounds < LEAST_ROUNDS or self.times_vary > BUSY

    @property
    def failures(self) -> list[str]:
        """Why this comparison is no pass; empty if it is one."""
        found = []
        for what, got, allowed in (
            (
                "boxes differ by {:.3g} px, allowed are {:.3g}",
                self.max_box_difference_px,
                self.allowed_box_difference_px,
            ),
            ("logits differ by {:.3g}, allowed are {:.3g}", self.max_logit_difference, self.allowed_logit_difference),
        ):
            if not got <= allowed:  # NaN fails too
                found.append(what.format(got, allowed))
        if not self.median_box_move_px >= LEAST_MOVE_PX:
            found.append(
                f"the decoder moves boxes by {self.median_box_move_px:.3g} px only, so equal boxes say nothing"
            )
        found += [
            f"{module or 'the model'} took its original forward: {reason}"
            for module, reasons in self.stepped_aside.items()
            for reason in reasons
        ]
        return found


@dataclass(frozen=True)
class Detections:
    """One model's answer on the photo, on the CPU."""

    logits: Tensor  # [Q, classes]
    boxes: Tensor  # [Q, 4] cx, cy, w, h in (0, 1)


def default_image() -> Path:
    """A photo that scikit-image's wheel holds, so that nothing is downloaded."""
    import skimage

    return Path(skimage.__file__).parent / "data" / "coffee.png"


def read_image(path: Path) -> Image.Image:
    """The photo, upright, at the usual size. Raises InputError if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = _in_8_bits(ImageOps.exif_transpose(file)).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"IMAGE must be a picture that Pillow reads, got {path}") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"IMAGE cannot be read: {error}") from None
    factor = min(SHORTER / min(image.size), LONGER / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would clip at 255; mode "I" is how older versions of it read such a PNG."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def to_pixel_values(image: Image.Image) -> Tensor:  # [1, 3, height, width]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    return ((pixels - mean) / std).unsqueeze(0)


def load_checkpoint(path: Path) -> Any:
    """The model of whatever `dab_fast.load_checkpoint` reads. Raises InputError.

    What `save_pretrained` wrote, transformers loads. For anything else its model is built by the shapes in the file.
    """
    if not path.exists():
        raise InputError(
            "--checkpoint must be a directory written by save_pretrained, with config.json, or a file that "
            f"dab_fast.load_checkpoint reads, got {path}"
        )
    model = _load_directory(path) if (path / "config.json").is_file() else _load_by_shapes(path)
    return model.eval()


def _load_by_shapes(path: Path) -> Any:
    from dab_fast.adapters.huggingface.build import build

    try:
        found = checkpoint.read(path)
        model = build(found.tensors, checkpoint.decoder_config(found), found.stated)
        return checkpoint.load(found, model)
    except Exception as error:  # transformers raises nearly anything at values that it does not expect
        raise InputError(f"--checkpoint cannot be used: {first_line(error)}") from error


def _load_directory(path: Path) -> Any:
    import transformers
    from transformers import AutoConfig

    transformers.utils.logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
        if kind != "dab-detr":
            raise InputError(f"--checkpoint must hold a dab-detr model, got {kind} in {path}")
        load: Any = transformers.DabDetrForObjectDetection.from_pretrained
        model, info = load(path, local_files_only=True, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:  # transformers raises nearly anything at a broken file
        raise InputError(f"--checkpoint {path} cannot be read: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"--checkpoint {path} lacks {len(missing)} parameters, the first is {missing[0]}")
    return model


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def resnet50_config() -> Any:
    """DAB-DETR-R50 as published, built without asking any hub."""
    import transformers

    config: Any = transformers  # its generated signatures leave out what the backbone reads
    return config.DabDetrConfig(backbone_config=config.ResNetConfig(out_features=["stage4"]))


def random_model(
    config: Any,
    pixel_values: Tensor,  # [1, 3, height, width]: its features set the scale of the input projection
    seed: int = 0,
) -> Any:
    """A DAB-DETR with every parameter drawn at random so that anchors cover the photo and boxes move with its content.

    Weights keep the variance of their input; a little more for queries and keys, so that attention is neither uniform
    nor chaotic. The input projection is scaled to features of zero mean and unit variance on this photo: a random
    ResNet's are a large constant plus a little image.
    """
    from transformers import DabDetrForObjectDetection

    model = DabDetrForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Conv2d) and key == "weight":
                    parameter.copy_(noise(parameter) * math.sqrt(2 / parameter[0].numel()))
                elif isinstance(module, nn.Linear) and key == "weight":
                    parameter.copy_(noise(parameter) * _gain(name) / math.sqrt(parameter.shape[1]))
                elif name.endswith("query_refpoint_embeddings"):
                    uniform = torch.rand(parameter.shape, generator=generator)
                    center, size = 0.05 + 0.9 * uniform[:, :2], 0.06 * 8 ** uniform[:, 2:]
                    parameter.copy_(torch.cat((center, size), 1).logit())
                elif isinstance(module, nn.LayerNorm | nn.PReLU) and key == "weight":
                    parameter.mul_(1 + 0.1 * noise(parameter))
                else:
                    parameter.add_(0.1 * noise(parameter))
        inner: Any = model.model
        projection = inner.input_projection
        mask = torch.ones(pixel_values.shape[0], *pixel_values.shape[-2:])
        features = projection(inner.backbone(pixel_values, mask)[0][-1][0])
        mean, std = features.mean((0, 2, 3)), features.std((0, 2, 3)).clamp(min=1e-6)
        projection.weight.div_(std[:, None, None, None])
        projection.bias.sub_(mean).div_(std).add_(0.1 * noise(mean))
    return model


def _gain(name: str) -> float:
    if name.endswith("bbox_predictor.layers.2"):
        return 0.1  # boxes move by tens of pixels, not across the photo
    is_query_or_key = any(part in name for part in ("query", "key", "q_proj", "k_proj"))
    return 1.5 if is_query_or_key else 1.0


def wreck_(model: Any) -> None:
    """Break the decoder a little: a tenth of noise in one projection of its first layer."""
    weight = model.model.decoder.layers[0].cross_attn.cross_attn_value_proj.weight
    with torch.no_grad():
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)


def run(
    image: Image.Image,
    name: str,
    model: Any,
    weights: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    wreck: bool = False,
    with_peers: bool = False,
    say: Say = lambda line: None,
) -> tuple[Comparison, Detections, Detections]:
    """Compares `model` with its accelerated copy; also returns what each detects.

    Args:
        image: at the size at which the model reads it.
        name: of the image, for the report.
        model: a Hugging Face `DabDetrForObjectDetection` in float32; it is moved to `device`.
        weights: where they come from, for the report.
        dtype: float32, or half precision by autocast: the original refuses half-precision parameters.
        with_peers: time what else runs the whole model, too.
    """
    original = model.to(device)
    accelerated = copy.deepcopy(original)
    report = dab_fast.accelerate(accelerated)
    if wreck:
        wreck_(accelerated)
    pixel_values = to_pixel_values(image).to(device)
    half = dtype != torch.float32

    def precision() -> AbstractContextManager[None]:
        return torch.autocast(device.type, dtype) if half else nullcontext()

    say("running both models")
    with torch.no_grad():
        exact: Any = original(pixel_values) if half else None
        with precision(), ExitStack() as stack:
            theirs, their_calls = by_parts.run_and_catch(original, pixel_values)
            ours, our_calls = by_parts.run_and_catch(accelerated, pixel_values)
            exact = exact if half else theirs
            anchors = our_calls["decoder"]().reference_points[0]
            peers: dict[str, Any] = {}
            if with_peers:
                say("compiling the model for its peers")
                peers = stack.enter_context(by_parts.peers(original, pixel_values))
            say("counting and timing the parts and the whole models, in turn")
            calls = {part: (their_calls[part], our_calls[part]) for part in their_calls}
            parts, found, times = by_parts.compare(original, accelerated, calls, pixel_values, peers)
    say("counting and timing training steps, in turn")
    step_images = functional.interpolate(pixel_values, size=STEP_SIZE).expand(STEP_BATCH, -1, -1, -1).contiguous()
    with precision():
        parts[by_parts.STEP], more = by_parts.compare_steps(original, accelerated, step_images, _labels(device))
    rounds = [t.best for t in (times | more).values()]
    comparison = Comparison(
        image=name,
        size=image.size,
        tokens=our_calls["decoder"].keywords["encoder_hidden_states"].shape[1],
        weights=weights,
        device=_describe(device),
        dtype=str(dtype).removeprefix("torch."),
        compared="accelerated under autocast against the original in float32"
        if half
        else "accelerated against original",
        **_differences(theirs, ours, exact, anchors, image.size),
        parts=parts,
        step_size=(STEP_BATCH, STEP_SIZE[1], STEP_SIZE[0]),
        peers=found,
        rounds=min(len(times) for times in rounds),
        times_vary=max(max(times) / min(times) for times in rounds),
        stepped_aside=report.stepped_aside,
    )
    answers = [Detections(x.logits[0].float().cpu(), x.pred_boxes[0].float().cpu()) for x in (exact, ours)]
    return comparison, answers[0], answers[1]


def _labels(device: torch.device) -> list[dict[str, Tensor]]:
    """Three objects in each image of the training step."""
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.25, 0.6, 0.1, 0.4], [0.7, 0.7, 0.4, 0.3]], device=device)
    return [
        {"class_labels": torch.tensor([0, 1, 1], device=device), "boxes": boxes + 0.01 * i} for i in range(STEP_BATCH)
    ]


def _differences(
    theirs: Any,
    ours: Any,
    exact: Any,  # the original's outputs in float32
    anchors: Tensor,  # [B, Q, 4], which the first layer reads
    size: tuple[int, int],
) -> dict[str, Any]:
    """Fields of `Comparison`: how far outputs are apart, and boxes from where they started."""
    pixels = torch.tensor([*size, *size], dtype=torch.float32, device=anchors.device)

    def box_difference(a: Any, b: Any) -> float:
        return ((a.pred_boxes.float() - b.pred_boxes.float()).abs() * pixels).max().item()

    def logit_difference(a: Any, b: Any) -> float:
        return (a.logits.float() - b.logits.float()).abs().max().item()

    return {
        "max_box_difference_px": box_difference(ours, exact),
        "max_logit_difference": logit_difference(ours, exact),
        "original_box_error_px": box_difference(theirs, exact),
        "original_logit_error": logit_difference(theirs, exact),
        "median_box_move_px": ((ours.pred_boxes - anchors).abs() * pixels)[..., :2].norm(dim=-1).median().item(),
    }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
