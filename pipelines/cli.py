"""The command line tool, ``deconv``. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from pipelines.cli_models import generate, score
from pipelines.errors import ConfigError, PipelineError, interruption_behind

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_INTERRUPTED = 130
_INTERRUPTED_MESSAGE = "interrupted; run the same command again to go on"


def _with_config(command: Any) -> Any:
    """Add the options that choose a configuration."""
    for option in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable."),
        click.option(
            "--config",
            "file",
            type=click.Path(path_type=Path),
            help="YAML file with sections as in the presets; what it leaves out comes from the preset.",
        ),
        click.option("--preset", default="demo", show_default=True, help="demo, wikitext2 or base."),
    ):
        command = option(command)
    return command


@click.group(context_settings=_CONTEXT, invoke_without_command=True)
@click.version_option(package_name="deconv", message="%(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    r"""Train convolution/deconvolution language models and register them in MLflow.

    \b
    Examples:
      deconv run                                    the demo: minutes on two CPU cores
      deconv plan --set corpus.path=data/shards     what a run would do
      deconv generate "Return the"                  text from the champion
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@_with_config
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary to this file too."
)
def run(preset: str, file: Path | None, overrides: tuple[str, ...], json_file: Path | None) -> None:
    r"""Run the pipeline: corpus, tokenizer, tokens, train, evaluate, register.

    What an earlier run has finished is not done again, and what it left half done is resumed.

    \b
    Examples:
      deconv run
      deconv run --set train.steps=600 --set register.name=my-model
      deconv run --preset wikitext2 --set corpus.path=s3://bucket/text --json summary.json
    """
    from pipelines.config import load_config
    from pipelines.embedded import EmbeddedPrefect
    from pipelines.environment import read_environment
    from pipelines.progress import configure_logging
    from pipelines.steps import plan
    from pipelines.store import Storage

    config = load_config(preset=preset, file=file, overrides=overrides)
    environment = read_environment()
    plan(config)  # whatever is wrong with the configuration or the corpus ends the run here, before anything starts
    Storage(environment.storage).check_writable()
    _check_folder("DECONV_HOME", environment.home)
    if json_file is not None:
        _check_folder("--json", json_file.absolute().parent)
    configure_logging()
    signal.signal(signal.SIGTERM, _interrupt)
    server = None if os.environ.get("PREFECT_API_URL") else EmbeddedPrefect(environment.home)
    try:
        if server is not None:
            server.start()
            os.environ["PREFECT_API_URL"] = server.api_url
        _prepare_prefect()
        from pipelines.flows import run_flow

        if server is not None:
            server.wait()
        summary = run_flow(config)
    finally:
        _shut_down_ray()
        if server is not None:
            server.stop()
    _show_summary(summary, _same_arguments(preset, file, overrides), json_file)


def _check_folder(setting: str, folder: Path) -> None:
    """Refuse before any work what could not be written after it."""
    from pipelines.files import check_folder

    try:
        check_folder(folder)
    except OSError as error:
        raise ConfigError(f"{setting}: the folder {folder} cannot be written ({error.strerror})") from error


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Treat SIGTERM, which schedulers send, as Ctrl-C; while the flow runs, Prefect has a handler of its own."""
    raise KeyboardInterrupt


def _prepare_prefect() -> None:
    """Let the records of the pipeline reach the flow run's log, and none of Prefect's the terminal twice."""
    for name, value in (
        ("PREFECT_LOGGING_EXTRA_LOGGERS", "pipelines,deconv_model"),
        ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL"),
        ("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore"),
    ):
        os.environ.setdefault(name, value)


def _shut_down_ray() -> None:
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def _same_arguments(preset: str, file: Path | None, overrides: tuple[str, ...]) -> list[str]:
    arguments = [] if preset == "demo" else ["--preset", preset]
    arguments += ["--config", str(file)] if file else []
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def _show_summary(summary: dict[str, Any], again: list[str], json_file: Path | None) -> None:
    from pipelines.files import atomic_write
    from pipelines.summary import render_summary

    click.echo(render_summary(summary, again))
    if json_file is not None:
        try:
            with atomic_write(json_file.absolute()) as temporary:
                temporary.write_text(json.dumps(summary, indent=2))
        except OSError as error:
            raise ConfigError(f"--json {json_file} cannot be written: {error.strerror}") from error


@cli.command()
@_with_config
@click.option("--json", "as_json", is_flag=True, help="Print the plan, with the specification of every step, as JSON.")
def plan(preset: str, file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    r"""Show the steps of a run, their addresses, and which are done already.

    \b
    Examples:
      deconv plan
      deconv plan --preset base
      deconv plan --json | jq '.steps[0]'
    """
    from pipelines import steps
    from pipelines.config import load_config
    from pipelines.environment import read_environment
    from pipelines.status import step_state
    from pipelines.store import Storage

    config = load_config(preset=preset, file=file, overrides=overrides)
    storage = Storage(read_environment().storage)
    planned = [{**spec.to_dict(), "state": step_state(spec, storage)} for spec in steps.plan(config)]
    if as_json:
        click.echo(json.dumps({"storage": storage.uri, "config": config.to_dict(), "steps": planned}, indent=2))
        return
    for step in planned:
        click.echo(f"{step['step']:<9}  {step['state']:<9}  {storage.uri}/{step['address']}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def status(as_json: bool) -> None:
    r"""Show the outputs in the storage: what runs, what is complete, what was left, and their sizes.

    \b
    Examples:
      deconv status
      DECONV_STORAGE=s3://bucket/steps deconv status --json
    """
    from pipelines.environment import read_environment
    from pipelines.status import list_outputs
    from pipelines.store import Storage

    storage = Storage(read_environment().storage)
    outputs = list_outputs(storage)
    if as_json:
        click.echo(json.dumps({"storage": storage.uri, "outputs": outputs}, indent=2))
        return
    click.echo(f"{storage.uri}: {len(outputs)} outputs, {sum(o['bytes'] for o in outputs) / 1e6:,.1f} MB")
    for output in outputs:
        size = f"{output['bytes'] / 1e6:,.1f} MB"
        click.echo(f"{output['address']:<24}  {output['state']:<9}  {size:>12}  {output['note']}".rstrip())


cli.add_command(generate)
cli.add_command(score)


def main() -> NoReturn:
    """Run the command line tool and exit: 0 done, 1 failed, 2 the user's fault, 130 interrupted."""
    sys.exit(_main())


def _main() -> int:
    try:
        cli.main(standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return _fail(f"{error.format_message().rstrip('.')}{where}", error.exit_code)
    except click.Abort:
        return _fail(_INTERRUPTED_MESSAGE, _INTERRUPTED)
    except PipelineError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at the end
        return 1
    except BaseException as error:
        if interruption_behind(error) is not None:
            return _fail(_INTERRUPTED_MESSAGE, _INTERRUPTED)
        if os.environ.get("DECONV_DEBUG"):
            raise
        kind = type(error).__name__
        return _fail(f"{kind}: {error} (set DECONV_DEBUG=1 to see where; running again goes on)", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
