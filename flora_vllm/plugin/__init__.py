"""The plugin: the only package that names vLLM's internals.

    options.py        what the user may set: one field an option
    carried.py        how the options reach every process
    hook.py, hook_table.py, scheduler_hooks.py, metrics_hooks.py, serving_hooks.py  the vLLM symbols we rely on
    hooks.py          versions, and the check of the table before anything is replaced
    install.py        replaces the seams listed in patches/, each only where vLLM does not offer the hook itself
    flags.py          command-line flags and their way into the engine's config
    mistakes.py       a user's mistake is told in one line
    attach.py         which layers of a model can be adapted, and how
    packing.py        which checkpoint tensors the slices of a packed layer come from
    trial.py          one run at start: which layers run on a step's rows
    manager.py        worker side: adapters in host memory, slots, the step's mapping
    step_faults.py    a step that could not serve its adapters fails their requests, not the engine
    stage_faults.py   the same of a pipeline's stages, of which the last alone is heard
    encoder_rows.py   encoder-decoder models: which layers run on the encoder's rows, and whose those are
    encoder_order.py  the order in which vLLM's runners encode
    loader.py         one adapter directory -> what a worker keeps
    model_layout.py   what a checkpoint may address in a model
    module_names.py   what a checkpoint calls a module -> what the engine calls it
    planned.py        the same of an adapter like one met before, in a fraction of the time
    memory.py         adapters in memory and in slots within a number of bytes
    prefetch.py       the engine core's side of loads beside steps; beside.py: the workers'
    asleep.py         meanwhile an engine's processes wait for each other without a core
    turns.py          an adapter that has waited too long for a slot drains one
    loads.py          counts of loads and evictions, and the engine's report of its adapters
    activation.py     activated adapters: whose a request's first tokens and cached blocks are
    mixes.py          how clients write a mix, and how the engine is told of it
    mix_requests.py   server side: the mix of a request
    answers.py        errors as vLLM's server answers them
    dropped.py        server side: routes that would lose it
    bodies.py         server side: a request's body, read before vLLM reads it
    choosers.py       server side: DLP-LoRA's folders, of which each prompt gets a mix
    told.py           headers that an answer gets
    identity.py       the name under which the engine knows one content
    preload.py        an engine's adapters: known by their content, loaded before the first request is queued
    refusals.py       our refusal of an adapter, found in an engine's error
    frontend.py       server side: names and identities, load, unload, resolvers
    lent.py           which adapters its request handlers may still ask with
    lasting.py        what goes on though its client has gone
    guard.py          which names, paths and digests are taken, what an answer may say
    names.py          what adapters may be called
    access.py         API keys, tenants and the adapters they see
    gate.py           the server's door: which requests need a key
    routes.py         which route a request is for
    media_ids.py      ids of images, audio and video that tenants may not choose
    listing.py        the list of adapters, and the answer at /metrics
    series.py         our series there
    traffic.py        tokens, first tokens and requests by adapter
    path_counts.py    which way products took
    waiting.py        why requests wait
    default_adapters.py  the adapter of requests that have images, audio or video
    stored_responses.py  /v1/responses with a store: whose a response is
    handed.py         adapters given as tensors or files instead of by a path
    restarted.py      what a server that is started again cannot load
    sleeping.py       the sleep that would lose adapters
    new_weights.py    the new weights of a base that are refused where the old are packed
    ending.py         the status of a server whose engine died
    uploads.py        the route that takes an adapter's files
    traces.py         the adapter on a request's span
    published.py      metrics and events: the names that clients use
    speech.py         the adapter's part in vLLM's speech server
    offline.py        flora_vllm.LLM

Nothing in `register` touches a GPU or imports vLLM's worker: it runs in every vLLM process, also for users who do
not use FLoRA, so it may neither be slow nor fail; a failure is kept and raised when FLoRA is asked for.
"""

_failure: BaseException | None = None


def register() -> None:
    """Entry point `vllm.general_plugins`. May be called any number of times."""
    global _failure
    try:
        from flora_vllm.plugin import flags

        flags.install()
        _failure = None
    except Exception as error:  # noqa: BLE001 - a broken plugin must not break vLLM for those who do not use it
        _failure = error


def require_registered() -> None:
    """Raises the reason for which `register` failed, if it did."""
    from flora_vllm.errors import HookError

    if _failure is not None:
        raise HookError(f"the FLoRA plugin could not be set up in this process: {_failure}") from _failure
