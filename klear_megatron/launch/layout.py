"""Where the ranks and servers of a job sit, and how a step is divided, in plain lines."""

from klear_megatron.launch.job import Job
from klear_megatron.planning.report import describe_plan
from klear_megatron.training.config import RunConfig


def describe_layout(job: Job) -> list[str]:
    """What `--dry-run` says after the script."""
    launch, data = job.launch, job.data()
    lines = [f"{job.name}: {job.nodes} nodes, `klear-megatron {launch.verb}`"]
    main = data["main"]
    for index in range(launch.nodes):
        first = index * main["tasks_per_node"]
        last = first + main["tasks_per_node"] - 1
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        what = f"{data['servers']['per_node']} servers" if launch.verb == "serve" else ranks
        lines.append(f"  node {index}: {main['role']}, {what}")
    for index in range(launch.nodes, job.nodes):
        servers = data["servers"]
        lines.append(
            f"  node {index}: {servers['per_node']} SGLang servers of "
            f"{servers['gpus_per_server']} GPUs"
        )
    if launch.servers and launch.servers.run:
        lines.append(f"  servers: those of {launch.servers.run}")
    elif launch.server_nodes:
        total = launch.server_nodes * data["servers"]["per_node"]
        lines.append(f"every data-parallel leader sends prompts to all {total} servers")
    if job.policy is not None:
        parallel, world_size = job.policy.parallel, launch.nodes * launch.ranks_per_node
        data_parallel = parallel.data_parallel_size(world_size)
        lines.append(
            f"{world_size} ranks = TP {parallel.tensor_model_parallel_size} x PP "
            f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP "
            f"{data_parallel}"
        )
        tokens = job.policy.tokens_per_micro_batch * parallel.context_parallel_size
        if isinstance(job.config, RunConfig):
            lines += job.config.describe_step(data_parallel)
        lines.append(
            f"micro-batches are packed up to {tokens} tokens ({job.policy.tokens_per_micro_batch} "
            f"per context-parallel rank); a longer sequence is one by itself"
        )
    if planned := job.plan():
        lines += describe_plan(planned)
    return lines
