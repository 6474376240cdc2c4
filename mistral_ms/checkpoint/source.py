"""An open checkpoint of any known format, to be read under our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from mistral_ms.checkpoint import keys
from mistral_ms.checkpoint.boxes import Box
from mistral_ms.checkpoint.buffers import check_buffers, skipped_text, tied_head
from mistral_ms.checkpoint.config_file import (
    describes_itself,
    model_type_of,
    read_config,
    read_quantization,
)
from mistral_ms.checkpoint.detect import choose_weights, layout_of
from mistral_ms.checkpoint.dtypes import FROM_CONFIG, FROM_OPTION, TO_CONFIG, WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.files import (
    CONFIG,
    MANIFEST,
    PARAMS,
    adapter_files,
    inside,
    side_files,
)
from mistral_ms.checkpoint.layout import FormatLayout, format_layout
from mistral_ms.checkpoint.manifest import read_manifest
from mistral_ms.checkpoint.mindformers_layout import find_table
from mistral_ms.checkpoint.packed_store import dequantized, leave_out_empty_biases
from mistral_ms.checkpoint.parts_store import read_box
from mistral_ms.checkpoint.plan import (
    Assembly,
    Piece,
    check_tensors,
    main_dtype,
    make_plan,
    target_dtype,
)
from mistral_ms.checkpoint.quantized_store import CodesAndScales, QuantizedStore
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.checkpoint.shards import check_dtypes, open_weights
from mistral_ms.checkpoint.stream import Store, Workspace, read_array, stream
from mistral_ms.checkpoint.verification import Verification
from mistral_ms.config import ModelConfig
from mistral_ms.config.packed_quantization import PackedQuantization
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import is_file
from mistral_ms.recognition import adapter_error
from mistral_ms.weights import expert_weights


class Source:
    """A checkpoint that was found whole and consistent; a context manager.

    Attributes:
        path: its directory.
        kind: hf, mistral, mistral-dump, mistral_ms or mindformers.
        config: the model.
        tensors: what the files hold, under the format's own names.
        layout: the model in that format.
        ignored_keys: keys of its configuration file that have no meaning here.
        skipped: names of what is in the files and no weight.
        side_files: tokenizer and generation files beside the weights.
        unapplied: names of adapters beside the weights, which are not read.
        store: random access to the files; quantised weights are dequantised.
        quantization: how weights are quantised in the files, if they are.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        config: ModelConfig,
        layout: FormatLayout,
        store: Store,
        ignored_keys: tuple[str, ...] = (),
        skipped: tuple[str, ...] = (),
        verification: Verification | None = None,
        follow_links: bool = False,
        quantization: Quantization | PackedQuantization | None = None,
    ) -> None:
        self.path, self.kind, self.config = path, kind, config
        self.quantization = quantization
        self.layout, self.store, self.ignored_keys = layout, store, ignored_keys
        self.skipped = skipped
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in store.tensors.items() if name not in skipped
        }
        self.side_files = side_files(path, follow_links)
        self.unapplied = adapter_files(path)
        self._verification = verification

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.verify()
        finally:
            self.close()

    def verify(self) -> None:
        """Ends the comparison with the digests that were recorded when the files were written.

        To be called before anything rests on what was read; leaving the context calls it as well.
        Checkpoints of others have no digests.

        Raises:
            CheckpointError: a file that was read is not the one that was written.
        """
        if self._verification is not None:
            self._verification.finish("model")

    def close(self) -> None:
        """Lets the files go, without a comparison."""
        self.store.close()

    def remark(self, kept: bool = False) -> str | None:
        """One line for whoever reads the checkpoint to say: what of it has no effect here (keys of
        its configuration file, buffers, adapters), and what becomes of quantised weights; None when
        there is nothing of the kind.

        Args:
            kept: the reader keeps quantised weights as they are.
        """
        said = []
        if self.quantization is not None:
            read = "are computed so" if kept else "are dequantised while they are read"
            said.append(f"weights of {self.path} are {self.quantization}, and {read}")
        if self.ignored_keys:
            keys = ", ".join(self.ignored_keys)
            where = f"in the configuration of {self.path}"
            said.append(f"ignored {where}, without effect on the model: {keys}")
        if self.skipped:
            said.append(f"skipped {skipped_text(self.skipped)}")
        if self.unapplied:
            adapters = ", ".join(self.unapplied)
            said.append(f"not applied to the weights of {self.path}: the adapter {adapters}")
        return "; ".join(said) or None

    @cached_property
    def _assemblies(self) -> dict[str, Assembly]:
        plan = make_plan(self.layout, format_layout(self.config))
        return {assembly.name: assembly for assembly in plan}

    def stored_tensors(self) -> dict[str, TensorInfo]:
        """What the files hold of :attr:`tensors`: of quantised weights codes and scales."""
        store = self.store.stored if isinstance(self.store, QuantizedStore) else self.store
        return {name: info for name, info in store.tensors.items() if name not in self.skipped}

    def codes_and_scales(self) -> CodesAndScales:
        """The same checkpoint, with its quantised experts as they are stored.

        Raises:
            CheckpointError: they are not quantised by us.
        """
        if not isinstance(self.store, QuantizedStore):
            raise CheckpointError("no quantised experts", where=self.path)
        names = [spec.name for spec in expert_weights(self.config)]
        return CodesAndScales(self, self.store, names)

    def names(self) -> tuple[str, ...]:
        """Our names of all tensors, in the order of the computation."""
        return tuple(self._assemblies)

    def _assembly(self, name: str) -> Assembly:
        try:
            return self._assemblies[name]
        except KeyError:
            raise CheckpointError(
                "no such tensor", where=self.path, value=name, rule="names are those of names()"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our tensors."""
        return self._assembly(name).shape

    def dtype(self, name: str) -> str:
        """Dtype that the files hold it in, as configurations call it (``bfloat16``).

        Raises:
            CheckpointError: its pieces have different ones.
        """
        return TO_CONFIG[target_dtype(self._assembly(name), self.tensors, "keep")]

    def dtype_option(self, option: str) -> str:
        """What to convert to: of quantised weights there are no bits to keep.

        Args:
            option: ``keep``, ``fp32``, ``fp16`` or ``bf16``.

        Returns:
            The same; the dtype of the configuration where ``keep`` means nothing.
        """
        if option != "keep" or not isinstance(self.store, QuantizedStore):
            return option
        dtype = FROM_CONFIG[self.config.torch_dtype]
        return next(name for name, each in FROM_OPTION.items() if each == dtype)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """What one of our tensors is assembled of, in its order."""
        return self._assembly(name).pieces

    def read_slice(
        self, name: str, tensor_slice: tuple[slice, ...], dtype: str = "float32"
    ) -> np.ndarray:
        """Reads a rectangle of one of our tensors: of the files only the rows that it meets.

        Args:
            name: our name.
            tensor_slice: one slice with plain bounds for each axis.
            dtype: as for :meth:`read`.

        Raises:
            CheckpointError: as for :meth:`read`.
        """
        assembly, box = self._assembly(name), Box.of(tensor_slice)
        if self.kind != "mistral_ms":
            rows = self.read(name, dtype, (box.start[0], box.stop[0]))
            rest = (slice(None), *tensor_slice[1:])
            return np.ascontiguousarray(rows[rest])
        values = read_box(self.store, name, box)
        stored = self._stored(assembly, dtype)
        have = self.tensors[name].dtype
        if have == stored:
            return values
        out = np.empty(values.size, WEIGHT_DTYPES[stored])
        if overflowed := cast(values.reshape(-1), have, stored, out):
            raise CheckpointError(
                "overflow",
                where=f"{self.path}: {name}",
                value=f"{overflowed} values",
                rule=f"must fit {TO_CONFIG[stored]}",
                todo="keep the dtype, or choose one with a larger range",
            )
        return out.reshape(values.shape)

    def stream(
        self,
        assembly: Assembly,
        dtype: str,
        workspace: Workspace,
        span: tuple[int, int] | None = None,
    ) -> Iterator[np.ndarray]:
        """Streams a tensor that is assembled of this checkpoint's; see
        :func:`~mistral_ms.checkpoint.stream.stream`.
        """
        return stream(self.store, assembly, dtype, workspace, span)

    def _stored(self, assembly: Assembly, dtype: str) -> str:
        if dtype == "keep":
            return target_dtype(assembly, self.tensors, "keep")
        if dtype in FROM_CONFIG:
            return FROM_CONFIG[dtype]
        raise CheckpointError(
            "unknown dtype",
            where="dtype",
            value=repr(dtype),
            rule=f"must be one of keep, {', '.join(FROM_CONFIG)}",
        )

    def read(
        self, name: str, dtype: str = "float32", rows: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Reads one of our tensors into memory.

        Args:
            name: our name.
            dtype: ``keep``, ``float32``, ``float16`` or ``bfloat16``. NumPy has no bfloat16: such
                an array comes as its bits, uint16.
            rows: (first, last + 1) along the first axis, for a rank that wants its experts or its
                heads only; None for all.

        Returns:
            A new array of shape ``[rows, ...]``.

        Raises:
            CheckpointError: an unknown name or dtype, rows that are not there, or values that
                ``dtype`` cannot hold.
        """
        assembly = self._assembly(name)
        first, last = rows or (0, assembly.shape[0])
        if not 0 <= first <= last <= assembly.shape[0]:
            raise CheckpointError(
                "no such rows",
                where=f"{self.path}: {name}",
                value=f"{first} to {last}",
                rule=f"it has {assembly.shape[0]}",
            )
        stored = self._stored(assembly, dtype)
        return read_array(self.stream, assembly, stored, (first, last))


def open_checkpoint(
    path: Path,
    kind: str | None = None,
    *,
    config: ModelConfig | None = None,
    verify: bool = True,
    follow_links: bool = False,
    rank: int = 0,
    world: int = 1,
    adapters: bool = False,
) -> Source:
    """Opens a checkpoint of any known format and checks all that can be checked without reading.

    Args:
        path: its directory; or one file that MindFormers has written, where a directory holds
            those of several steps. The configuration lies beside it.
        kind: which format to take when the directory holds several.
        config: the model of files of MindFormers where no configuration lies beside them.
        verify: of a checkpoint of ours, compare what is read with the recorded digests. The sizes
            of its files are always compared.
        follow_links: links may lead out of the directory, or out of the hub's cache that it lies
            in; see :func:`~mistral_ms.checkpoint.files.inside`.
        rank: of this process among those that read the checkpoint together.
        world: how many they are; each compares its share of the files.
        adapters: take the adapters that a training here has saved, too; they are no whole model.

    Raises:
        CheckpointError: anything that is wrong with it, each in its own words: unknown or several
            formats, an unsupported architecture, quantised weights, missing, truncated or extra
            files, links that lead outside, missing or extra tensors, wrong shapes.
        MissingExtraError: its files are pickles, and torch is not installed.
    """
    path = Path(path)
    weights = choose_weights(path, kind)
    if is_file(path):
        path = path.parent
    described = [CONFIG, PARAMS, MANIFEST, *([weights.index.name] if weights.index else [])]
    if weights.kind == "mindformers":
        described += [each.name for each in path.glob("*.y*ml")]
    for name in described:
        if is_file(path / name):
            inside(path, name, path, follow_links)
    if weights.kind == "mindformers" and config is not None and not describes_itself(path):
        ignored: tuple[str, ...] = ()
    else:
        config, ignored = read_config(path, weights.kind)
    if config.lora is not None and not adapters:
        raise adapter_error(path, "saved by a training")
    verification: Verification | None = None
    if weights.kind == "mistral_ms":
        records = read_manifest(path, follow_links)
        unlisted = [p for p in weights.files if p.name not in records]
        if unlisted:
            raise CheckpointError(
                "extra shard", where=unlisted[0], rule="the manifest does not list it"
            )
        if verify:
            verification = Verification(path, records, rank, world)
            verification.check_small()
    quantization = read_quantization(path, weights.kind)
    store = open_weights(path, weights, follow_links, quantized=quantization is not None)
    try:
        if quantization is not None:
            store = dequantized(store, config, quantization, path)
            check_dtypes(weights.kind, store)
        if verification is not None:
            store.observe(verification.see)
        skipped = check_buffers(weights.kind, store, config)
        if weights.kind == "mindformers":
            table = find_table(store.tensors, config, layout_of(kind), path)
        else:
            table = keys.table_of(weights.kind, store.tensors, model_type_of(path, weights.kind))
        layout = format_layout(config, table)
        leave_out_empty_biases(store, layout.shapes)
        copies = tied_head(config, layout, store)
        checked = {n: i for n, i in store.tensors.items() if n not in copies and n not in skipped}
        check_tensors(checked, layout.shapes, path)
        if weights.kind in ("mistral", "mistral-dump", "mindformers"):
            # their configurations do not say the dtype: the files do
            config = config.model_copy(update={"torch_dtype": main_dtype(checked)})
        return Source(
            path,
            weights.kind,
            config,
            layout,
            store,
            ignored,
            skipped,
            verification,
            follow_links,
            quantization,
        )
    except BaseException:
        store.close()
        raise
