"""`--enable-flora` and its options on every vLLM command line, folded into `additional_config`.

Also the gate: an engine config that asks for FLoRA is only made after vLLM's version and hooks were verified.
"""

import argparse
import functools
import importlib
import logging
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.options import add_flags, flags_of, given
from flora_vllm.plugin import encoder_rows, mistakes, towers
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import KEY, FloraOptions, faults_without_server, options_of

logger = logging.getLogger(__name__)

RUST_FRONTEND = (
    "VLLM_USE_RUST_FRONTEND: vLLM's Rust server loads no Python plugins, so it would not know adapters by our names "
    "nor load and unload them; unset it to serve with --enable-flora"
)
FAST_PREFILL = (
    "--kv-sharing-fast-prefill: layers that share others' keys and values would run on the last token of each prompt "
    "only, and adapters find a row by its place among all of a step's; leave it out to serve with --enable-flora"
)
_WRAPPED = "_flora_wrapped"


def install() -> None:
    """Wraps three methods of vLLM's EngineArgs, once; or registers hooks where vLLM takes them."""
    arg_utils = importlib.import_module("vllm.engine.arg_utils")
    if offers("vllm.engine.arg_utils:register_engine_args_hooks"):  # patches/0007
        own = arg_utils.EngineArgsHooks(_add_flags, _fold, _before_config, _after_config)
        arg_utils.register_engine_args_hooks(KEY, own)
        return
    engine_args = arg_utils.EngineArgs
    if hasattr(engine_args, _WRAPPED):
        return
    add_cli_args = engine_args.__dict__["add_cli_args"].__func__
    from_cli_args = engine_args.__dict__["from_cli_args"].__func__
    create_engine_config = engine_args.create_engine_config

    @functools.wraps(add_cli_args)
    def add_with_flora(parser):
        return _add_flags(add_cli_args(parser))

    @functools.wraps(from_cli_args)
    def from_args_with_flora(cls, args):
        return from_cli_args(cls, _fold(args))

    @functools.wraps(create_engine_config)
    def create_with_flora(self, *args, **kwargs):
        _before_config(self)
        config = create_engine_config(self, *args, **kwargs)
        _after_config(config)
        return config

    engine_args.add_cli_args = staticmethod(add_with_flora)
    engine_args.from_cli_args = classmethod(from_args_with_flora)
    engine_args.create_engine_config = create_with_flora
    setattr(engine_args, _WRAPPED, (add_cli_args, from_cli_args, create_engine_config))


def _add_flags(parser: Any) -> Any:
    group = parser.add_argument_group(
        title="FLoRA", description="Serve FLoRA, HiRA, IA3 and LoRA adapters, each request with its own (flora-vllm)."
    )
    group.add_argument(
        "--enable-flora",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Serve adapters through flora-vllm; implies --enable-lora.",
    )
    # Without it `--flora` is an ambiguous beginning of the flags below.
    group.add_argument("--flora", action=_Suggestion, nargs="?", help=argparse.SUPPRESS)
    add_flags(FloraOptions, group)
    _fold_what_is_parsed(parser)
    return parser


class _Suggestion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error("there is no --flora; --enable-flora serves adapters through flora-vllm")


def options_from(args: Any) -> FloraOptions | None:
    """The options that a server's arguments ask for; None if it is to serve without FLoRA. Raises ConfigError."""
    return options_of(getattr(_fold(argparse.Namespace(**vars(args))), "additional_config", None))


def _fold_what_is_parsed(parser: Any) -> None:
    """vLLM hands the parsed arguments to its other processes (more API servers, one for each data-parallel rank), where
    they become engine options before our plugin is loaded."""
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(*args, **kwargs):
        parsed, rest = parse(*args, **kwargs)
        return _fold(parsed), rest

    parser.parse_known_args = parse_known_args


def _fold(args: argparse.Namespace) -> argparse.Namespace:
    mistakes.tell_in_one_line()
    on_command_line = given(FloraOptions, args)
    if not getattr(args, "enable_flora", False):
        if on_command_line:
            flags = flags_of(FloraOptions, on_command_line)
            raise ConfigError(f"{flags} given without --enable-flora; add --enable-flora or leave them out")
        return args
    mistakes.check_lora_modules(getattr(args, "lora_modules", None))
    config = dict(getattr(args, "additional_config", None) or {})
    config[KEY] = {**config.get(KEY, {}), **on_command_line}
    options = FloraOptions.from_mapping(config[KEY])
    if getattr(args, "grpc", False) and (faults := faults_without_server(options)):
        raise ConfigError("; ".join(["--grpc: vLLM's gRPC server knows no keys and no names of ours", *faults]))
    args.additional_config = config
    args.enable_lora = True
    return args


def _before_config(engine_args: Any) -> None:
    """Make vLLM ready for a FLoRA engine. Raises ConfigError or HookError rather than serve the wrong thing."""
    if options_of(engine_args.additional_config) is None:
        return
    from flora_vllm.plugin import install, require_registered

    require_registered()
    if importlib.import_module("vllm.envs").VLLM_USE_RUST_FRONTEND:
        raise ConfigError(RUST_FRONTEND)
    engine_args.enable_lora = True
    install.install_all()


def _after_config(config: Any) -> None:
    """Refuse what a FLoRA engine cannot serve (ConfigError), and have its options installed wherever the config
    arrives."""
    options = options_of(config.additional_config)
    if options is None:
        return
    if config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError(FAST_PREFILL)
    if config.lora_config.fully_sharded_loras:
        # vLLM's own LoRA, padded to the largest rank, saves memory and work so.
        logger.info("--fully-sharded-loras has no effect: an adapter takes what its own rank needs, nothing is padded")
        config.lora_config.fully_sharded_loras = False
    if config.model_config.is_encoder_decoder:
        encoder_rows.prepare_config(config)
    elif towers.is_asked(config):
        towers.prepare_config(config)
    from flora_vllm.plugin import graphs
    from flora_vllm.plugin.carried import carried

    config.additional_config = {**config.additional_config, KEY: carried(graphs.resolve(options, config))}
