"""Records of arrays that pass between layers of the code, and the letters in their shapes.

Letters, the same everywhere:
  B rows or answers   G answers per prompt   N prompts      T tokens in a row   S cached keys
  P prompt tokens     A answer tokens        D model width  H head size         V vocabulary
  K key-value heads   R query heads per key-value head      F mlp width         L layers
"""

from typing import Any

from flax import struct
from jaxtyping import Bool, Float, Int

Params = Any  # nested dict of arrays
Array = Any  # of JAX or of numpy: a record lies on the device or on the host


class Prompts(struct.PyTreeNode, kw_only=True):
    """Token ids of N prompts, right-padded. `index` names each problem in random keys."""

    tokens: Int[Array, "N P"]
    length: Int[Array, " N"]
    index: Int[Array, " N"]


class Limits(struct.PyTreeNode, kw_only=True):
    """What may differ from one call of the rollout engine to the next and compile nothing anew."""

    temperature: Float[Array, ""]  # above 0; not read where the engine is greedy
    max_new: Int[Array, ""]  # tokens in an answer, up to those the engine was compiled for


class Rollout(struct.PyTreeNode, kw_only=True):
    """G answers to each of N prompts; answer i belongs to prompt i // G, and B = N * G.

    Token ids are those that were sampled. An answer's last token is its end token unless it was
    cut off. Entries past `answer_length` are 0.
    """

    prompt: Int[Array, "N P"]
    prompt_length: Int[Array, " N"]
    answer: Int[Array, "B A"]
    answer_length: Int[Array, " B"]
    finished: Bool[Array, " B"]  # ended by itself, not cut off
    logp_rollout: Float[Array, "B A"]  # the sampler's, at sampling time
    decode_steps: Int[Array, ""]
    slot_steps: Int[Array, ""]  # slots decoded, summed over the steps
    reward: Float[Array, " B"] | None = None  # nan: could not be judged
    parts: Float[Array, "B S"] | None = None  # of a weighted reward, before their weights, in order
    logp_old: Float[Array, "B A"] | None = None  # the trainer's, before the first update
    logp_ref: Float[Array, "B A"] | None = None  # the frozen model's, or a teacher's
    entropy: Float[Array, "B A"] | None = None  # of the policy that `logp_old` is of
    value: Float[Array, "B A"] | None = None  # the critic's return expected before each token
    process: Float[Array, "B A"] | None = None  # a process reward model's reward of each token
    prompt_choice: Int[Array, "N P E k"] | None = None  # experts that tokens took, in E layers
    answer_choice: Int[Array, "B A E k"] | None = None
    drafted: Int[Array, ""] | None = None  # tokens, by a prediction module
    accepted: Int[Array, ""] | None = None  # of those


class Batch(struct.PyTreeNode, kw_only=True):
    """Packed rows. Row r holds several sequences one after another, told apart by `segment`.

    Index t of every field speaks of the token at t: `mask` is True where the policy chose that
    token, and log-probabilities are of that token given those before it in its segment. `weight`
    is what a token's loss counts for in the sum over the whole update, so that a loss is a plain
    sum and does not depend on packing, micro-batches or devices; it is 0 where `mask` is False.
    `num_tokens` is the count of `mask` over the whole update: per-token metrics divide by it.

    Answers to one prompt may share it: the prompt is then a segment of its own, to the left, that
    each of them names in `prompt` and goes on from, in `position` too. Without `prompt` and
    `before` no segment continues another.

    What is said of a whole sequence stands at each of its tokens: its outcome, its label (1 for
    the better answer of a pair, 0 for the worse). The two sequences of a pair lie in one row.
    """

    tokens: Int[Array, "B T"]
    position: Int[Array, "B T"]  # 0 at the start of each sequence
    segment: Int[Array, "B T"]  # 1, 2, ... from left to right; 0 is padding
    mask: Bool[Array, "B T"]
    weight: Float[Array, "B T"]
    num_tokens: Float[Array, ""]
    prompt: Int[Array, "B T"] | None = None  # the segment that this token's continues; 0: none
    before: Int[Array, "B T"] | None = None  # the column of the token before; any at position 0
    choice: Int[Array, "B T E k"] | None = None  # experts to take, in E layers; -1: the router's
    advantage: Float[Array, "B T"] | None = None
    logp_rollout: Float[Array, "B T"] | None = None
    logp_old: Float[Array, "B T"] | None = None
    logp_ref: Float[Array, "B T"] | None = None
    entropy: Float[Array, "B T"] | None = None  # of the policy in training, with its gradient
    value_old: Float[Array, "B T"] | None = None  # the critic's, before the first update
    target: Float[Array, "B T"] | None = None  # a return, or the sequence's outcome or label
    pair: Int[Array, "B T"] | None = None  # 1, 2, ... in each row; 0: in no pair
    kl_estimate: Float[Array, ""] | None = None  # KTO's reference point, one for the update


class TrainState(struct.PyTreeNode, kw_only=True):
    """All that an update reads and writes. `step` counts updates of this stage."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    reference: Params | None = None  # frozen weights of the KL term; a critic's first ones
    kl_weight: Float[Array, ""] | None = None  # of the next step, where it is adaptive
    critic: "TrainState | None" = None  # of a network beside the policy
