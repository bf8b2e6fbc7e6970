"""A causal language model and its tokenizer, with the handles that the rest of the program uses.

`LM` names what differs between architectures (where the blocks are, what ends a completion, which ids must never be
drawn) so that no other module asks. Works for Llama, Qwen2, Gemma 3 text, and the multimodal Gemma 3 class, whose
vision tower is never touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steerheal.errors import UserError, card_failed, ran_out
from steerheal.settings import Settings
from steerheal.weights import cards, is_local, locate, weights_digest

IMAGE_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")  # Gemma's; text-only configs do not name them
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class LM:
    """A loaded model. `digest` identifies weights, dtype, attention and quantisation: equal digest, equal results."""

    name: str
    digest: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantised: bool = False

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @cached_property
    def decoder(self) -> nn.Module:
        """The text decoder: token ids -> final (normed) hidden states."""
        return self.model.get_decoder()

    @cached_property
    def blocks(self) -> nn.ModuleList:
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def text(self, ids: list[int]) -> str:
        """Ids as text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @cached_property
    def blocks_path(self) -> str:
        """Dotted path of the block list inside the model, such as 'model.layers'."""
        return next(path for path, module in self.model.named_modules() if module is self.blocks)

    @cached_property
    def softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., d] -> float32 logits [..., vocabulary]."""
        out = self.model.get_output_embeddings()(hidden).float()
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap

    def band(self, lo: float, hi: float) -> list[int]:
        """Block indices int(lo*L) .. int(hi*L)-1, at least one."""
        n = len(self.blocks)
        first = min(int(lo * n), n - 1)
        return list(range(first, max(int(hi * n), first + 1)))

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a completion: generation_config's list and the tokenizer's own."""
        listed = self.model.generation_config.eos_token_id
        ids = {listed} if isinstance(listed, int) else set(listed or ())
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)

    @cached_property
    def banned(self) -> Tensor:
        """Ids that are never drawn: image tokens and rows of the head past the tokenizer's length. [n]"""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = set(range(len(self.tokenizer), vocabulary))
        images = map(self.tokenizer.convert_tokens_to_ids, IMAGE_TOKENS)
        ids |= {i for i in images if isinstance(i, int) and i != self.tokenizer.unk_token_id}
        config = self.model.config
        for name in ("image_token_id", "image_token_index", "boi_token_index", "eoi_token_index", "boi_token_id",
                     "eoi_token_id", "video_token_id", "audio_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int) and 0 <= value < vocabulary:
                ids.add(value)
        return torch.tensor(sorted(ids), dtype=torch.long, device=self.device)


def load(settings: Settings, commit: str = "") -> LM:
    """The model a run names, ready on its device, in evaluation mode, with no gradients on base weights.

    Args:
        commit: of a hub model; the newest one in the cache by default.

    Raises:
        UserError: the model cannot be found, fetched or read; the message says which and what to do.
    """
    path = locate(settings.model, commit)
    device = usable_device(settings.device)
    options: dict[str, Any] = dict(dtype=DTYPES[settings.dtype], attn_implementation=settings.attention,
                                   device_map={"": device}, local_files_only=True)
    if settings.quantise == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if ran_out(error) or card_failed(error):
            raise  # a trial's ends of their own, and no fault of the files
        way = "Check it" if is_local(settings.model) else "Delete that folder to fetch it again"
        raise UserError(f"model = {settings.model!r}: {path} cannot be loaded ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]}). {way}, or name another model.") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model = {settings.model!r} has no chat template: it is a base model. Name an instruct model.")
    digest = hashlib.sha256(f"{weights_digest(path)} {settings.dtype} {settings.attention} {settings.quantise}".encode())
    packed = bool(getattr(model, "is_quantized", False))  # by the settings, or as the checkpoint comes
    if packed and not getattr(model, "is_loaded_in_4bit", False):
        raise UserError(f"model = {settings.model!r} comes quantised in a way that is not supported here: allowed are weights "
                        f"that are not quantised, and bitsandbytes 4-bit. Name the model that it was made from.")
    lm = wrap(model, tokenizer, settings.model, digest.hexdigest(), quantised=packed)
    from steerheal.architectures import check  # which runs a model, so it knows what this module defines

    check(lm)
    return lm


def usable_device(wanted: str) -> str:
    """"cpu", or "cuda" where a card answers. A card that is there and does not answer is an error: on the CPU a search that
    was meant for it would take weeks, and say nothing.

    Raises:
        UserError: no card answers, and one was asked for or nvidia-smi shows one.
    """
    if wanted == "cpu":
        return "cpu"
    way = "--set device=cpu, or CUDA_VISIBLE_DEVICES= before the command, leaves cards alone."
    if not torch.cuda.is_available():
        if wanted == "cuda" or cards():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
            raise UserError(f"device = {wanted}: torch {torch.__version__}, {built}, cannot use a CUDA card here. Compare "
                            f"with the driver that nvidia-smi shows, and install a build of torch for it; {way}")
        return "cpu"
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        raise UserError(f"device = {wanted}: the card does not answer ({(str(error).splitlines() or [''])[0]}). nvidia-smi "
                        f"shows driver and memory; {way}") from error
    return "cuda"


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, digest: str,
         quantised: bool = False) -> LM:
    """An LM around a model that is already in memory (tests, notebooks)."""
    model.eval()
    model.requires_grad_(False)
    if quantised:
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first pass without gradients, for a kernel
        # that has no backward: later gradients would lose every quantised layer, with no more than a warning.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  no attribute that nn.Module declares
    return LM(name, digest, model, tokenizer, quantised)
