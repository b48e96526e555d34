"""`evaluate` as a command: the function that training uses, on any model folder or Hub id."""

from clm_dist.config import Config
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest
from clm_dist.data.tokenize import load_tokenizer, tokenizer_sha256
from clm_dist.errors import UserError
from clm_dist.model.build import load_model
from clm_dist.model.configuration import load_configuration
from clm_dist.model.padding import looks_for_padding
from clm_dist.model.positions import check_fits
from clm_dist.training import run_folder
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import Evaluation, evaluate
from clm_dist.training.job import check_padding
from clm_dist.training.launch import check_launch
from clm_dist.training.meter import figures
from clm_dist.training.precision import check_precision
from clm_dist.training.proof import prove
from clm_dist.training.runtime import finish, start


def evaluate_model(
    config: Config, name: str, revision: str | None, output: str | None, opened: tuple[Manifest, Blocks]
) -> Evaluation:
    """Measures the model `name` on the held-out blocks of the recipe. Every rank must call this.

    opened: what `admit_evaluation` has let in.
    Prints the figures and, where `output` is given, saves them by `evaluate.save` (with time, commit and versions).
    """
    manifest, blocks = opened
    check_launch(config.train.mixed_precision)  # which is settled by now
    check_precision(config.train.mixed_precision)
    trust = config.model.trust_remote_code
    built = load_configuration(name, revision, trust)
    check_fits(built, config.data.block_size, manifest.vocab_size, name)
    tokenizer = load_tokenizer(name, revision, trust)
    sha256 = tokenizer_sha256(tokenizer)
    if sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{name} has another tokenizer (sha256 {sha256[:12]}) than the data was prepared with ({manifest.tokenizer}, "
            f"{manifest.tokenizer_sha256[:12]}); prepare again with data.tokenizer={name} and another data.prepared_dir"
        )
    if looks_for_padding(built):
        check_padding(built, (blocks,), [], tokenizer, name, trained=True)
    accelerator = start(config.train.mixed_precision)
    model = load_model(name, built, revision, trust, config.model.attention)
    isolate = config.train.isolate_documents
    model.config.use_cache = False  # type: ignore[union-attr]  # a cache of keys and values serves generation only
    objective = prove(config, model, name, accelerator.device)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    batches = Batches(blocks, isolate, accelerator.device)
    result = evaluate(
        accelerator, model, objective, batches, config.evaluate.micro_batch_size, manifest.tokens_per_byte("eval")
    )
    assert result is not None  # nobody asked it to leave
    if accelerator.is_main_process:
        print(f"{name}: {figures(result.metrics())}", flush=True)
        if output is not None:
            from evaluate import saving

            # its own asks git about the working folder: it fails where there is no git, and elsewhere git complains aloud
            saving._git_commit_hash = run_folder.commit
            saving.save(output, **result.metrics(), model=name, data=config.data.prepared_dir)
            print(f"saved in {output}", flush=True)
    finish(accelerator)
    return result
