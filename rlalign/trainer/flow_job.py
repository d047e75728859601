"""Building a run of a flow model, and its rollouts: prompts to scored trees.

Every process grows the trees of its share of the prompts; structure, rewards and log-probs of all
trees are then on every process, the states (which are large) stay where they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from rlalign.algos.tree_shape import full_tree
from rlalign.config import Config, ConfigError
from rlalign.models.flow import take_rows
from rlalign.rewards import Scorer, build_scorer
from rlalign.rewards import check as check_rewards
from rlalign.rollout.flow import FlowTrees, grow, make_plan
from rlalign.rollout.flow_noise import TreeKey
from rlalign.tasks.image_prompts import load_image_prompts
from rlalign.tracking.rundir import RunDir
from rlalign.trainer.build import RewardFunctions, build_train_engine
from rlalign.trainer.distributed import World
from rlalign.trainer.flow_policy import FlowPolicy
from rlalign.trainer.flow_update import FlowBatch
from rlalign.trainer.job import Run
from rlalign.trainer.opening import Observers, entered, open_run
from rlalign.types import Prompt, Scores


@dataclass(kw_only=True)
class FlowJob(Run):
    """One run of a flow model."""

    policy: FlowPolicy
    scorer: Scorer

    def save_model(self, folder: Path) -> None:
        self.policy.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class FlowRollout:
    """The trees of one step of all processes, scored. `scores` are of the leaves, in order."""

    batch: FlowBatch
    prompts: list[Prompt]  # of the step, all processes
    scores: Scores
    pictures: dict[int, Tensor]  # node of the first trees: image [C, H, W]
    rollout_s: float
    reward_s: float


@contextmanager
def open_flow_job(
    config: Config,
    *,
    resume: bool = False,
    reward_functions: RewardFunctions | None = None,
    make_observers: Observers = lambda config, run_dir: (),
) -> Iterator[FlowJob]:
    """As `build.open_job`, for `rollout.engine=flow`."""

    def assemble(world: World, run_dir: RunDir, stack: ExitStack) -> FlowJob:
        return _assemble(config, reward_functions or {}, world, run_dir, stack)

    with open_run(config, assemble, resume=resume, make_observers=make_observers) as job:
        yield job


@contextmanager
def open_flow_evaluation(
    config: Config, *, reward_functions: RewardFunctions | None = None
) -> Iterator[FlowJob]:
    """A job that is only evaluated: it has no run directory. Raises ConfigError where there is no
    held-out data."""
    if not config.task.eval:
        raise ConfigError("task.eval is not set: name the held-out data, e.g. task.eval=test.jsonl")
    with ExitStack() as stack:
        world = stack.enter_context(entered(config))
        yield _assemble(config, reward_functions or {}, world, RunDir(Path()), stack)


def _assemble(
    config: Config, functions: RewardFunctions, world: World, run_dir: RunDir, stack: ExitStack
) -> FlowJob:
    if config.trainer.prompts_per_step < world.size:
        raise ConfigError(
            f"trainer.prompts_per_step = {config.trainer.prompts_per_step} with {world.size} "
            "processes: each grows the trees of at least one prompt; raise it, or use fewer"
        )
    with world.agreed("loading data and model"):
        train = load_image_prompts(config.task, split="train", seed=config.seed)
        held_out = load_image_prompts(config.task, split="eval") if config.task.eval else None
        for prompts in (train, *([held_out] if held_out else [])):
            check_rewards(config.rewards, prompts.columns, functions=functions, images=True)
        scorer = build_scorer(config.rewards, config.algo, 0, functions=functions, images=True)
        stack.callback(scorer.close)
        policy = FlowPolicy.from_config(config, device=world.device)
    make_plan(config.rollout.flow, 0, policy.time_grid(config.rollout.flow))
    engine = build_train_engine(policy, config, world)
    stack.callback(engine.close)
    return FlowJob(
        config=config,
        world=world,
        engine=engine,
        run_dir=run_dir,
        train_prompts=train,
        eval_prompts=held_out,
        policy=policy,
        scorer=scorer,
    )


def roll_out(job: FlowJob, step: int) -> FlowRollout:
    """Grow and score the trees of the next prompts."""
    config, world, flow = job.config, job.world, job.config.rollout.flow
    prompts = job.train_prompts.take(job.progress.cursor, config.trainer.prompts_per_step)
    plan = make_plan(flow, step, job.policy.time_grid(flow)).to(world.device)
    keys, group_R = tree_keys(prompts, flow.roots_per_prompt)
    mine_r = (group_R % world.size == world.rank).nonzero()[:, 0]
    began = perf_counter()
    # Whole parameters: processes need not call the network equally often here.
    with job.engine.full_parameters(), world.agreed("rollout"), torch.no_grad():
        used = [prompts[int(g)] for g in group_R[mine_r]]
        cond = job.policy.condition(used)

        def velocity(z_MX: Tensor, sigma_M: Tensor, tree_M: Tensor) -> Tensor:
            return job.policy(z_MX, sigma_M, take_rows(cond, tree_M))

        local = grow(
            plan,
            velocity,
            [keys[int(r)] for r in mine_r],
            group_R[mine_r],
            job.policy.latent_shape,
            flow,
            seed=config.seed,
            iteration=step,
            num_previews=min(flow.pictures, len(mine_r)) if world.is_main else 0,
        )
        middle = perf_counter()
        per_tree = plan.shape.num_leaves
        leaf_prompts = [prompt for prompt in used for _ in range(per_tree)]
        images_LCHW = job.policy.decode(local.final_LX)
        scores = job.scorer.score_images(
            leaf_prompts, images_LCHW, group_R[mine_r].repeat_interleave(per_tree)
        )
        pictures = _pictures(job, local, images_LCHW)
    end = perf_counter()
    batch, scores = _shared(local, group_R, mine_r, scores, plan, cond, world)
    pictures = {int(batch.own_N[node]): image for node, image in pictures.items()}
    return FlowRollout(batch, prompts, scores, pictures, middle - began, end - middle)


def tree_keys(prompts: Sequence[Prompt], roots: int) -> tuple[list[TreeKey], Tensor]:
    """The noise key and the prompt occurrence of each tree; a prompt that comes twice in a step
    goes on counting its trees."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        first = seen.get(prompt.id, 0)
        seen[prompt.id] = first + roots
        keys += [(prompt.id, first + r) for r in range(roots)]
    return keys, torch.arange(len(prompts)).repeat_interleave(roots)


def _pictures(job: FlowJob, local: FlowTrees, images_LCHW: Tensor) -> dict[int, Tensor]:
    """Of the first trees, by local node: the leaves, and what the network saw coming at the root
    and at each split's children (decoding every node of a large model would take too long)."""
    shape = make_plan(job.config.rollout.flow, 0).shape
    levels = shape.levels(len(local.tree.tree_N.unique()))
    found = {}
    for depth, preview_MX in enumerate(local.preview_DMX):
        if len(preview_MX) and (depth == 0 or shape.factors[depth - 1] > 1):
            images = job.policy.decode(preview_MX.to(job.world.device)).cpu()
            found |= {levels[depth].start + i: image for i, image in enumerate(images)}
    shown = len(local.preview_DMX[0]) * shape.num_leaves
    return found | {
        levels[-1].start + i: image.cpu() for i, image in enumerate(images_LCHW[:shown])
    }


def _shared(
    local: FlowTrees, group_R: Tensor, mine_r: Tensor, scores: Scores, plan, cond, world: World
) -> tuple[FlowBatch, Scores]:
    """The trees of all processes with their rewards and log-probs, and the scores of all leaves."""
    shape, names = plan.shape, list(scores.by_function)
    tree = full_tree(group_R, shape, ode_steps=plan.ode_steps)
    levels = shape.levels(len(group_R))
    own = [
        level.start + (mine_r[:, None] * width + torch.arange(width)).flatten()
        for level, width in zip(levels, shape.widths, strict=True)
    ]
    own_N, leaves = torch.cat(own), levels[-1]
    found_FN = torch.zeros(3 + len(names), len(tree))
    found_FN[0, own_N] = local.tree.logp_N
    values = [scores.reward_B, scores.acc_B, *scores.by_function.values()]
    found_FN[1:, own[-1]] = torch.stack([value_B.float() for value_B in values])
    found_FN = world.all_reduce_sum(found_FN, "scores of the trees")
    said = world.all_gather_bytes(json.dumps(dict(scores.errors)).encode(), "failed verdicts")
    errors = sum((Counter(json.loads(part)) for part in said), Counter())
    reward_B, acc_B, *functions = found_FN[1:, leaves]
    reward_N = torch.full((len(tree),), torch.nan)
    reward_N[leaves] = reward_B
    actions_N = torch.where(tree.num_actions_N > 0, int(local.tree.num_actions_N.max()), 0)
    tree = tree.replace(reward_N=reward_N, logp_N=found_FN[0], num_actions_N=actions_N)
    batch = FlowBatch(plan, tree, local, own_N, tree.group_N % world.size, cond)
    return batch, Scores(reward_B, acc_B, dict(zip(names, functions, strict=True)), dict(errors))
