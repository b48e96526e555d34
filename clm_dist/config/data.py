"""`data`: which text, cut into which blocks."""

from typing import Literal

from pydantic import Field

from clm_dist.config.section import Section
from clm_dist.fields import Count, Location, Sources


class MixtureEntry(Section):
    """One source of a mixture. What it leaves out is that of `data`."""

    source: Sources = Field(description="As data.source.")
    weight: float = Field(gt=0, description="Share of the tokens, relative to the other weights.")
    config_name: str | None = Field(None, description="As data.config_name.")
    revision: str | None = Field(None, description="As data.revision.")
    text_column: str | None = Field(None, description="As data.text_column. None: that of `data`.")


class DataConfig(Section):
    """Which text, cut into which blocks."""

    source: Sources | None = Field(
        None,
        description="Local files, folders or globs, one or a list (.json, .jsonl, .csv, .txt, .parquet, each also .gz), "
        "or a data set on the Hub (owner/name).",
    )
    mixture: tuple[MixtureEntry, ...] = Field(
        (),
        description="Instead of `source`: several, each with a weight. At every moment each has its share of the tokens, "
        "to within one document.",
    )
    mixture_stop: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="When a mixture ends: with the first source that has no more (nothing is repeated), or when all were "
        "read (smaller ones are repeated; documents held out for evaluation never are).",
    )
    config_name: str | None = Field(None, description="Configuration of a Hub data set that has several.")
    revision: str | None = Field(
        None, description="Commit or tag of a Hub data set. None takes the newest and records which that was."
    )
    streaming: bool = Field(
        False,
        description="Read a Hub data set as it comes instead of fetching it first: for sets larger than the disk.",
    )
    train_split: str = Field("train", description="Split to train on. A local source without splits is all `train`.")
    eval_split: str | None = Field(
        None,
        description="Named split to evaluate on (instead of eval_fraction). Locally: files with this word in the name.",
    )
    eval_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the documents of train_split held out for evaluation; 0: no evaluation.",
    )
    split_seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="Which documents eval_fraction holds out. Apart from `seed`, so that runs of several seeds "
        "share one evaluation set.",
    )
    text_column: str = Field("text", description="Column with the text; dots reach into nested ones (answers.text).")
    text_separator: str = Field(" ", description="Joins a column that holds a list of texts, as the guide does.")
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="A broken record ends the work, or is left out, counted, and written to bad_records.jsonl.",
    )
    deduplicate: bool = Field(False, description="Leave out exact copies of a document; the first of them stays.")
    min_document_tokens: Count | None = Field(None, description="Leave out documents of fewer tokens.")
    max_document_tokens: Count | None = Field(None, description="Leave out documents of more tokens.")
    append_eos: bool = Field(
        True,
        description="End-of-text after every document, so that the model learns where one ends. The guide does not.",
    )
    tokenizer: Location | None = Field(None, description="Folder or Hub id of the tokenizer. None: that of model.name.")
    tokenizer_vocab_size: int | None = Field(
        None,
        ge=257,
        description="Train a byte-level BPE of so many tokens on the training documents instead of loading one.",
    )
    block_size: int = Field(
        128, ge=2, description="Tokens per training sequence (T). The guide's 128 fits small memory."
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate",
        description="One stream of text cut every block_size tokens, as the guide does; or whole documents into blocks "
        "where they fit best, the rest of a block padding, and only documents longer than a block cut.",
    )
    independent_shards: Count | None = Field(
        None,
        description="Group the text in so many parts, each by itself: less than one block is lost in each of them instead "
        "of in the whole split.",
    )
    prepared_dir: Location = Field(description="Folder for the blocks on disk: written by `prepare`, read by `train`.")

    def entries(self) -> tuple[MixtureEntry, ...]:
        """The sources one by one, each complete: those of `mixture`, or `source` alone."""
        alone = MixtureEntry(source=self.source or "", weight=1, config_name=self.config_name, revision=self.revision)
        column = self.text_column
        entries = self.mixture or (alone,)
        return tuple(entry.model_copy(update={"text_column": entry.text_column or column}) for entry in entries)
