"""Other rules of credit for trees of tokens, as presets over tree_advantage.py.

    spo         A = V(n) - V(pa), where it is not 0; likely tokens         Guo et al. 2025
                (>= 0.9) do not train
    tree_rl     global plus local, over the root of the leaves below       Hou et al. 2025
    tree_po     against all ancestors, whitened over the batch             Li et al. 2025
    tree_grpo   z-score among the prompt's leaves plus that within a tree  Ji et al. 2025

The last three train every leaf as a sequence of its own, so tokens that several leaves share count
that often (`weight=leaf_count`). All trees of a prompt have one root, the prompt (`scope=prompt`).
"""

from rlalign.algos.base import Algorithm

SHARED = {"adv_estimator": "tree", "loss_agg_mode": "token-mean"}
OF_LEAVES = {"fuse": "leaf_mean", "weight": "leaf_count", "scope": "prompt"}

ALGORITHMS = (
    Algorithm(
        name="spo",
        summary="Segment advantages: a node's value against its parent's; probable tokens masked.",
        source="Guo et al. 2025, arXiv 2505.23564",
        defaults={**SHARED, "scale_rewards": "none"},
        tree={
            "advantage": "parent",
            "scope": "prompt",
            "weight": "token_mean",
            "drop_zero": True,
            "prob_mask": 0.9,
        },
    ),
    Algorithm(
        name="tree_rl",
        summary="A node's value against the root's and its parent's, forked at unlikely tokens.",
        source="Hou et al. 2025, arXiv 2506.11902",
        defaults={**SHARED, "scale_rewards": "none"},
        tree={"advantage": "root_parent", **OF_LEAVES},
    ),
    Algorithm(
        name="tree_po",
        summary="A leaf against the mean under each of its ancestors.",
        source="Li et al. 2025, arXiv 2508.17445",
        defaults={**SHARED, "scale_rewards": "batch", "epsilon": 0.2, "epsilon_high": 0.28},
        tree={"advantage": "ancestors", **OF_LEAVES},
    ),
    Algorithm(
        name="tree_grpo",
        summary="A leaf among the leaves of its prompt, and of its tree.",
        source="Ji et al. 2025, arXiv 2509.21240",
        defaults=SHARED,
        tree={"advantage": "leaves", **OF_LEAVES},
    ),
)
