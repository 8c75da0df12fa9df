"""`normexp_language_modeling`: fairseq's language_modeling, with the training text in order.

fairseq cuts the training text into segments and trains on them in random order. The code that the
paper's language models build on puts `streams` equal parts of the text side by side instead, and
each batch has the next segment of every part.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fairseq.data import MonolingualDataset, TokenBlockDataset
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask


@dataclass
class StreamsConfig(LanguageModelingConfig):
    """fairseq's LanguageModelingConfig and the number of streams."""

    streams: int = field(
        default=0,
        metadata={
            "help": "cut the training text into so many contiguous parts and read all of them "
            "in order, --batch-size of them at a time; 0: segments in random order"
        },
    )


def stream_slices(num_tokens: int, streams: int, length: int) -> np.ndarray:
    """Return begins and ends (segments, 2) of the segments of parallel streams, in training order.

    The text is cut into `streams` contiguous parts whose lengths differ by one token at most, and
    each part into segments of `length` tokens, the last of them shorter. The first segments of all
    parts come first, then the second ones, and so on. Every token is in one segment. Raises
    ValueError where there are more streams than tokens.
    """
    if not 1 <= streams <= num_tokens:
        raise ValueError(
            f"streams={streams} must be at least 1 and at most the {num_tokens} tokens of the text"
        )
    bounds = np.arange(streams + 1) * num_tokens // streams
    begins, ends = bounds[:-1], bounds[1:]
    offsets = np.arange(0, (ends - begins).max(), length)
    firsts = begins + offsets[:, None]
    lasts = np.minimum(firsts + length, ends)
    exist = firsts < ends
    return np.stack([firsts[exist], lasts[exist]], axis=1)


def check_streams(streams: int, batch_size: int | None, break_mode: str | None) -> None:
    """Raise ValueError where batches cannot be the streams' segments in order.

    streams: not 0. batch_size: in sentences, that is segments. break_mode: sample_break_mode.
    """
    if break_mode not in (None, "none"):
        raise ValueError(
            f"streams have no regard for lines: sample_break_mode={break_mode} must be none"
        )
    if streams < 0 or not batch_size or streams % batch_size:
        raise ValueError(
            f"streams={streams} need a batch_size that divides them, not {batch_size}: a batch is "
            "the next segment of so many of them"
        )


class StreamBlocks(TokenBlockDataset):
    """fairseq's blocks of tokens, cut from parallel streams; sources are targets shifted by one."""

    def __init__(self, *args: Any, streams: int, **kwargs: Any):
        self.streams = streams
        super().__init__(*args, **kwargs)

    def _build_slice_indices(  # an instance's here, for `streams`; static in fairseq
        self, sizes: np.ndarray, break_mode: str | None, document_sep_len: int, block_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends_of_lines = np.cumsum(np.asarray(sizes, dtype=np.int64))
        slices = stream_slices(int(ends_of_lines[-1]), self.streams, block_size)
        first_line, last_line = np.searchsorted(ends_of_lines, slices - [0, 1], side="right").T
        begins_of_lines = ends_of_lines - sizes
        lines = [first_line, slices[:, 0] - begins_of_lines[first_line], last_line]
        return slices[:, 1] - slices[:, 0], np.stack(lines, axis=1), slices


class StreamDataset(MonolingualDataset):
    """Segments in the order of the streams, never shuffled."""

    def ordered_indices(self) -> np.ndarray:
        """Return the indices of all segments, in order."""
        return np.arange(len(self))


@register_task("normexp_language_modeling", dataclass=StreamsConfig)
class StreamsTask(LanguageModelingTask):
    """fairseq's language modeling; with `streams` the training text in order.

    Other splits stay fairseq's whatever `streams` is: a perplexity must not depend on how many
    parts were scored side by side.
    """

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split as fairseq does, the training split as streams.

        Raises ValueError where streams and other settings contradict each other.
        """
        super().load_dataset(split, epoch, combine, **kwargs)
        streams = self.args.streams
        if streams == 0 or not split.startswith("train"):
            return
        check_streams(streams, self.args.batch_size, self.args.sample_break_mode)
        shuffled = self.datasets[split]
        text = shuffled.dataset.dataset
        blocks = StreamBlocks(
            text,
            text.sizes,
            self.args.tokens_per_sample,
            pad=self.dictionary.pad(),
            eos=self.dictionary.eos(),
            include_targets=True,
            streams=streams,
        )
        self.datasets[split] = StreamDataset(
            blocks,
            blocks.sizes,
            src_vocab=self.dictionary,
            tgt_vocab=self.output_dictionary,
            targets=self.targets,
            add_bos_token=self.args.add_bos_token,
        )

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return fairseq's iterator; batches of streams come in order in every epoch."""
        batches = super().get_batch_iterator(dataset, *args, **kwargs)
        if isinstance(dataset, StreamDataset):
            batches.disable_shuffling = True
        return batches
