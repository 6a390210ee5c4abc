"""How surely PP-OCRv4 reads the text that a prompt asks for: its CTC log-probability per character."""

import re
import reprlib
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mlcm_rl.rewards import PipFile, Weights

from ._onnx import OnnxNetwork

PP_OCRV4_WEIGHTS = Weights(
    name="pp_ocrv4_recogniser",
    source=PipFile("rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    sha256="48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    licence="Apache-2.0",
)
QUOTED = r"""「([^「」]+)」|『([^『』]+)』|“([^“”]+)”|"([^"]+)"|＂([^＂]+)＂"""
HEIGHT, MIN_WIDTH = 48, 320  # pixels, of a line of text as the recogniser was trained on
FRAME = 8  # pixels, of a line to a frame of the recogniser
FLOOR = 1e-12  # of a probability: where the network is sure of something else, its logarithm stays a number


class Ocr:
    """The log-probability, per character, that a picture reads as the text asked for.

    That text is what stands in the prompt between quotation marks, 「」 『』 “” "" ＂＂; several quotations count
    one after another. `text_pattern` is another regular expression for it: its groups, or all it matches if it has
    none.
    """

    differentiable = False
    needs_prompt = True
    languages = ("en", "zh")  # of the prompt; the text itself may mix Chinese and Latin
    weights: ClassVar[tuple[Weights, ...]] = (PP_OCRV4_WEIGHTS,)

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, text_pattern: str = QUOTED):
        self.device, self.dtype = torch.device(device), dtype
        self.text_pattern = re.compile(text_pattern)
        self.recogniser = OnnxNetwork(PP_OCRV4_WEIGHTS)
        characters = [*self.recogniser.metadata["character"].splitlines(), " "]
        self.label_of = {character: label for label, character in enumerate(characters, start=1)}  # 0 is CTC's blank

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Log-probability per character (B,) float32, at most 0, of `images` (B, 3, H, W) in [0, 1], one line each.

        Raises ValueError for a prompt that asks for no text, for a character that the recogniser does not know, and
        for a text that is too long for the pictures' shape.
        """
        texts = [asked_text(prompt, self.text_pattern) for prompt in prompts]
        labels = [self._labels(text) for text in texts]
        log_probs = self.read(images)
        for text, label in zip(texts, labels, strict=True):
            if frames_needed(label) > log_probs.shape[1]:
                shape = f"{images.shape[3]} x {images.shape[2]}"
                raise ValueError(
                    f"the text {reprlib.repr(text)} is too long to be read in one line of a picture of {shape} pixels"
                )
        return (ctc_log_prob(log_probs, labels) / torch.tensor([len(label) for label in labels])).to(images.device)

    def refuse_prompt(self, prompt: str, aspect: float) -> None:
        """Raise ValueError for a `prompt` that no picture of this width / height can be scored for."""
        text = asked_text(prompt, self.text_pattern)
        if frames_needed(self._labels(text)) > line_width(aspect) / FRAME:
            raise ValueError(f"the text {reprlib.repr(text)} is too long to be read in one line of a picture")

    def read(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, T, L) of the blank and the characters, in T frames from left to right, on the CPU."""
        return self.recogniser(_line_pixels(images)).clamp(min=FLOOR).log()

    def _labels(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self.label_of.keys())
        if unknown:
            raise ValueError(
                f"the text {reprlib.repr(text)} has characters that PP-OCRv4 does not know: {' '.join(unknown[:20])}"
            )
        return [self.label_of[character] for character in text]


def asked_text(prompt: str, pattern: re.Pattern[str]) -> str:
    """The text that `prompt` asks for, without space about it; raises ValueError where it asks for none."""
    groups = [match.groups() or (match.group(),) for match in pattern.finditer(prompt)]
    text = "".join(group for found in groups for group in found if group).strip()
    if not text:
        raise ValueError(
            f'the prompt {reprlib.repr(prompt)} asks for no text: put it in quotation marks, 「」 『』 “” "", '
            "or say by the setting `text_pattern` where it stands"
        )
    return text


def line_width(aspect: float) -> float:
    """The width of a line of text in pictures of this width / height, as the recogniser reads it."""
    return max(MIN_WIDTH, HEIGHT * aspect)


def frames_needed(labels: list[int]) -> int:
    """The fewest frames that hold `labels`: one each, and a blank between two of the same."""
    return len(labels) + sum(first == second for first, second in zip(labels, labels[1:], strict=False))


def ctc_log_prob(log_probs: Tensor, labels: list[list[int]]) -> Tensor:
    """Log of the summed probability of all alignments of each of `labels` (B,): Graves et al. (2006), equation 3.

    log_probs (B, T, L) float32, label 0 the blank; every text must fit its T frames (`frames_needed`).
    """
    lengths = torch.tensor([len(label) for label in labels])
    frames = torch.full_like(lengths, log_probs.shape[1])
    flat = torch.tensor([one for label in labels for one in label])
    return -F.ctc_loss(log_probs.transpose(0, 1), flat, frames, lengths, blank=0, reduction="none")


def _line_pixels(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], RGB, as the recogniser reads them: BGR in [-1, 1], (B, 3, 48, W'), W' >= 320.

    A line narrower than 320 pixels is followed by the grey 0, as in training.
    """
    height, width = images.shape[2:]
    size = (HEIGHT, max(1, round(HEIGHT * width / height)))
    line = F.interpolate(images.detach().float().cpu(), size, mode="bilinear", antialias=True, align_corners=False)
    return F.pad(2.0 * line.flip(1) - 1.0, (0, max(0, MIN_WIDTH - size[1])))
