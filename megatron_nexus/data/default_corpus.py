"""The default corpus: the Python standard library and a tokenizer trained on it, ready to be read.

About 30 MB (half of it where the package `test` is not installed), prepared once and kept under the cache
folder:

    python-stdlib-<fingerprint>/     corpus.bin  corpus.idx  tokenizer.model  manifest.json

The folder gets this name when it is complete and on the disk, so that a kill at any time leaves nothing
that could be mistaken for it. Processes that race wait for the first of them.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megatron_nexus.base.durable import DRAFT, atomic_dir, exclusive_lock
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.errors import DataError, os_errors_as
from megatron_nexus.log import Progress, logger

NAME = "python-stdlib"
FORMAT_VERSION = 2
"""Part of the fingerprint: raise it when the same Python would give another corpus."""

SHUFFLE_SEED = b"nexus"
DOCUMENTS_PER_BATCH = 64
TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class DefaultCorpus:
    """A prepared default corpus."""

    prefix: Path
    """Prefix of its `.bin` and `.idx` files."""
    tokenizer_path: Path
    """The SentencePiece model that it was written with."""
    fingerprint: str
    """sha256 of all that decides its contents, in hexadecimal."""
    documents: int
    """Number of documents; each ends with the end-of-document token."""
    bytes: int
    """UTF-8 bytes of all documents."""
    tokens: int
    """Tokens of all documents, end-of-document tokens included."""
    prepend_bos: bool = False
    """Whether every document begins with the tokenizer's BOS token."""

    def to_json(self) -> str:
        """Return all of it as text, for other ranks of this machine."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "DefaultCorpus":
        """Return what `to_json` wrote."""
        fields = parse_json(text)
        paths = {name: Path(fields[name]) for name in ("prefix", "tokenizer_path")}
        return cls(**{**fields, **paths})


def cache_folder(data_cache_path: str) -> Path:
    """Return where the built-in corpus is kept: as given, or in the user's cache folder (XDG)."""
    if data_cache_path:
        return Path(data_cache_path)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "megatron_nexus"


def prepare_default_corpus(
    cache_root: Path,
    vocab_size: int,
    collect: Callable[[], Iterable[str]] = standard_library_documents,
    tokenizer: Tokenizer | None = None,
) -> DefaultCorpus:
    """Return the default corpus of this Python, from the cache or prepared now (about 20 s on two cores).

    The fingerprint covers the documents themselves and not only names, sizes and dates: reading them takes
    half a second, and nodes whose files differ in dates alone share one cache.

    It is kept below `cache_root`, in the pieces of a tokenizer of `vocab_size` that is trained on it, or in
    those of `tokenizer`, with BOS where that says so. `collect` is another source of documents.

    Raises DataError: the cache folder is not writable or full, or the vocabulary does not fit the corpus.
    """
    with Progress("Reading the Python standard library"):
        documents = _shuffled(collect())
    fingerprint = _fingerprint(documents, _source_of_ids(tokenizer) if tokenizer else vocab_size)
    if tokenizer is not None and not tokenizer.document_prefix:
        # The tokenizer that was trained on these very documents: their corpus lies there already.
        own = _fingerprint(documents, tokenizer.vocab_size)
        model = cache_root / f"{NAME}-{own[:12]}" / TOKENIZER_FILE
        if model.is_file() and SentencePieceTokenizer(model).fingerprint == tokenizer.fingerprint:
            fingerprint, vocab_size, tokenizer = own, tokenizer.vocab_size, None
    folder = cache_root / f"{NAME}-{fingerprint[:12]}"
    remedy = "free some space (100 MB are enough) or name another local folder with --data-cache-path"
    with os_errors_as(DataError, f"the default corpus cannot be kept in {cache_root}", remedy):
        corpus = _complete(folder, fingerprint)
        if corpus is None:
            cache_root.mkdir(parents=True, exist_ok=True)
            waiting = Progress("Waiting for another process that prepares the default corpus")
            with exclusive_lock(cache_root / f"{NAME}.lock", waiting):
                corpus = _complete(folder, fingerprint) or _prepare(
                    folder, fingerprint, list(documents.values()), vocab_size, tokenizer
                )
    if tokenizer is not None:
        begins = bool(tokenizer.document_prefix)
        corpus = dataclasses.replace(corpus, tokenizer_path=tokenizer.model_path, prepend_bos=begins)
    logger.info(
        f"Default corpus: {corpus.documents:,} documents, {corpus.bytes / 1e6:.1f} MB, {corpus.tokens:,} "
        f"tokens, {corpus.bytes / corpus.tokens:.2f} bytes per token, in {folder}"
    )
    return corpus


def _shuffled(documents: Iterable[str]) -> dict[bytes, str]:
    """Return different, non-empty documents by hash, in the order of the hashes.

    That order is a shuffle which no version of a random generator can change, and one more document leaves
    the others where they were.
    """
    by_hash = {hashlib.sha256(SHUFFLE_SEED + text.encode()).digest(): text for text in documents if text}
    return dict(sorted(by_hash.items()))


def _source_of_ids(tokenizer: Tokenizer) -> str:
    if not tokenizer.document_prefix:
        return tokenizer.fingerprint
    return f"{tokenizer.fingerprint} begins with {tokenizer.document_prefix}"


def _fingerprint(documents: dict[bytes, str], tokenizer: int | str) -> str:
    """Return the fingerprint; `tokenizer`: how many pieces are trained, or what decides another one's ids."""
    facts = (FORMAT_VERSION, platform.python_version(), version("sentencepiece"), tokenizer)
    return hashlib.sha256(repr(facts).encode() + b"".join(documents)).hexdigest()


def _complete(folder: Path, fingerprint: str) -> DefaultCorpus | None:
    """Return the corpus in `folder` if all its files are there in full."""
    try:
        manifest = parse_json((folder / "manifest.json").read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in manifest["file_bytes"]}
    except (FileNotFoundError, ValueError):
        return None
    if manifest["fingerprint"] != fingerprint or sizes != manifest["file_bytes"]:
        return None
    counts = (manifest[name] for name in ("documents", "bytes", "tokens"))
    return DefaultCorpus(folder / "corpus", folder / TOKENIZER_FILE, fingerprint, *counts)


def _prepare(
    folder: Path, fingerprint: str, documents: list[str], vocab_size: int, tokenizer: Tokenizer | None
) -> DefaultCorpus:
    """Write a complete corpus to `folder`, under the lock."""
    for stale in folder.parent.glob(f"{DRAFT}{NAME}-*"):
        shutil.rmtree(stale)
    if folder.exists():
        logger.info("%s is damaged and is prepared again", folder)
        shutil.rmtree(folder)
    with atomic_dir(folder) as draft:
        if tokenizer is None:
            with Progress(f"Training a tokenizer of {vocab_size} pieces on the default corpus"):
                train_sentencepiece_bpe(documents, draft / TOKENIZER_FILE, vocab_size)
            tokenizer = SentencePieceTokenizer(draft / TOKENIZER_FILE)
        facts = _write(draft, documents, tokenizer)
        file_bytes = {file.name: file.stat().st_size for file in draft.iterdir()}
        manifest = {"fingerprint": fingerprint, **facts, "file_bytes": file_bytes}
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=2))
    corpus = _complete(folder, fingerprint)
    assert corpus is not None, f"{folder} was removed while it was written"
    return corpus


def _write(folder: Path, documents: list[str], tokenizer: Tokenizer) -> dict[str, int]:
    """Tokenize the documents into `folder`; count what was written."""
    threads = len(os.sched_getaffinity(0))
    begin, end = np.array(tokenizer.document_prefix, np.int32), np.array([tokenizer.eod_id], np.int32)
    text_bytes, tokens = sum(len(text.encode()) for text in documents), 0
    with (
        Progress("Tokenizing the default corpus", text_bytes, "MB") as progress,
        IndexedDatasetWriter(folder / "corpus", token_dtype(tokenizer.vocab_size)) as writer,
    ):
        for first in range(0, len(documents), DOCUMENTS_PER_BATCH):
            batch = documents[first : first + DOCUMENTS_PER_BATCH]
            for text, ids in zip(batch, tokenizer.encode_documents(batch, threads), strict=True):
                writer.add_document(np.concatenate([begin, ids, end]))
                tokens += len(begin) + len(ids) + len(end)
                progress.advance(len(text.encode()))
    return {"documents": len(documents), "bytes": text_bytes, "tokens": tokens}
