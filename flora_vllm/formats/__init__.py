"""Adapter checkpoints on disk <-> the canonical form; knows nothing of ops or vLLM."""

from flora_vllm.formats.families.table import FAMILIES
from flora_vllm.formats.files import AdapterFiles, content_digest, read_files
from flora_vllm.formats.paths import resolve_under
from flora_vllm.formats.reader import Examination, digest_and_family, examine, read_adapter
from flora_vllm.formats.tasks import split_task
from flora_vllm.formats.writer import write_flora

__all__ = [
    "FAMILIES",
    "AdapterFiles",
    "Examination",
    "content_digest",
    "digest_and_family",
    "examine",
    "read_adapter",
    "read_files",
    "resolve_under",
    "split_task",
    "write_flora",
]
