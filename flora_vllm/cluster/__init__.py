"""Many engines behind one endpoint: which adapters live on which replicas, and how requests find them.

    policy      decides copies and places; pure numpy, no Ray
    controller  keeps the plan in a Serve deployment actor     agent   carries it out inside each replica
    router      sends a request to a warm replica              serve_llm   server and ingress for ray.serve.llm
    merged      all replicas' series and adapters, as one
    refusals    what a client is told that cannot be served
    ray_hooks   the only module that uses alpha or internal names of Ray

Importing this package imports neither Ray nor vLLM.
"""
