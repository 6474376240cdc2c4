"""Defects that someone could make, each with the fast tests that must notice it.

A mutant is one replacement in one file of the package. ``tests`` are files of the fast part
(``make fast``); at least one of their tests must fail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A planted defect.

    Attributes:
        name: what it is, for a person.
        file: below ``mistral_ms/``.
        old: the text that is replaced; must occur exactly once.
        new: what takes its place.
        tests: files below ``tests/`` that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, *tests: str, **mutants: tuple[str, str]) -> list[Mutant]:
    """The mutants of one file; names are words joined by underscores."""
    return [
        Mutant(name.replace("_", " "), file, old, new, tests)
        for name, (old, new) in mutants.items()
    ]


MUTANTS = [
    *of(
        "ops/reference/routing.py",
        "ops/reference/test_routing.py",
        weights_are_not_normalised=("if normalize:", "if not normalize:"),
        weights_are_divided_by_all_probabilities=(
            "weights_TK / _sum_keep(weights_TK, -1)",
            "weights_TK / _sum_keep(probs_TE, -1)",
        ),
        one_place_more_than_there_is=(
            "position_TK < float(C // G)",
            "position_TK <= float(C // G)",
        ),
        one_place_is_never_used=("position_TK < float(C // G)", "position_TK < float(C // G - 1)"),
        padding_gets_a_place=(
            "num_experts, _ON, _OFF) * valid_T.reshape(-1, 1, 1)",
            "num_experts, _ON, _OFF) * ops.ones_like(valid_T).reshape(-1, 1, 1)",
        ),
        choice_major_is_token_major=("if choice_major:\n        queue", "if False:\n        queue"),
        places_are_counted_from_one=("queue_GQE, -1) - 1.0", "queue_GQE, -1)"),
        kept_choices_count_as_routed=(
            "ops.stop_gradient(_sum(chosen_TKE, (0, 1)))",
            "ops.stop_gradient(_sum(kept_TKE, (0, 1)))",
        ),
    ),
    *of(
        "ops/reference/routing.py",
        "moe/test_local_groups.py",
        groups_share_their_slots=("(tokens // groups) * (capacity // groups)", "tokens * capacity"),
        a_group_has_the_slots_of_all=("position_TK < float(C // G)", "position_TK < float(C)"),
        experts_choose_across_groups=("    if groups == 1:\n", "    if True:\n"),
    ),
    *of(
        "ops/reference/routing.py",
        "moe/test_masking.py",
        a_full_expert_is_tried_again=("open_TE * (1.0 - wants_TE)", "open_TE"),
        rerouted_tokens_take_places_twice=("used_G1E + _sum_keep(got", "0.0 * _sum_keep(got"),
    ),
    *of(
        "ops/reference/assignment.py",
        "moe/gates/test_balanced_assignment.py",
        an_expert_has_a_token_too_many=("(tokens + E - 1) // E", "(tokens + E) // E"),
        rows_of_sinkhorn_are_scaled_to_columns=("(1.0 / T) / (", "(1.0 / E) / (1.0 + "),
    ),
    *of(
        "moe/losses.py",
        "moe/test_local_groups.py",
        means_of_groups_are_those_of_all=("scores_GE * counted_GE / tokens_G1", "scores_GE"),
        top_scores_are_the_choices=('routing.aux_choices == "top_scores"', "False"),
    ),
    *of(
        "moe/gates/base.py",
        "moe/test_masking.py",
        masked_outputs_are_rescaled=(
            "drawn_TK >= probability, ms.float32)",
            "drawn_TK >= probability, ms.float32) / (1 - probability)",
        ),
        outputs_are_not_scaled_in_evaluation=("weights_TK, 1.0 - probability", "weights_TK, 1.0"),
        share_is_not_rescaled=("kept_T1 / (1.0 - probability)", "kept_T1"),
    ),
    *of(
        "moe/shared.py",
        "moe/test_masking.py",
        shares_are_swapped=(
            "share_T1 * routed_TH + (1.0 - share_T1) * shared_TH",
            "(1.0 - share_T1) * routed_TH + share_T1 * shared_TH",
        ),
    ),
    *of(
        "models/objective.py",
        "moe/test_pyramid.py",
        a_layer_has_the_experts_of_the_largest=(
            "layer_of(sums, number, self.experts[number])",
            "layer_of(sums, number, max(self.experts))",
        ),
    ),
    *of(
        "ops/reference/permute.py",
        "ops/reference/test_permute.py",
        empty_places_hold_the_first_token=(
            "_gather(x_TH, source_EC // K, 0) * self.as_column(filled_EC, x_TH)",
            "_gather(x_TH, source_EC // K, 0)",
        ),
        dispatch_takes_the_choice_for_the_token=(
            "_gather(x_TH, source_EC // K, 0) *",
            "_gather(x_TH, source_EC % x_TH.shape[0], 0) *",
        ),
        dropped_choices_are_added=(
            "slot_TK, weights_TK * kept_TK)",
            "slot_TK, weights_TK)",
        ),
        only_the_first_choice_is_added=(
            "for k in range(1, K)",
            "for k in range(1, 1)",
        ),
        gradient_of_dispatch_counts_dropped_choices=(
            "self.weighted_rows(dout, slot_TK, kept_TK)",
            "self.weighted_rows(dout, slot_TK, ops.ones_like(kept_TK))",
        ),
        gradient_of_weights_counts_dropped_choices=(
            "weights_TK.dtype) * kept_TK",
            "weights_TK.dtype)",
        ),
    ),
    *of(
        "config/capacity.py",
        "moe/test_capacity.py",
        capacity_is_rounded_down=("math.ceil(exact)", "math.floor(exact)"),
        capacity_for_one_choice=("top_k * tokens", "tokens"),
        an_expert_may_have_no_place=("max(slots, routing.min_capacity)", "slots"),
        capacity_per_token_counts_choices=('routing.capacity_per == "token"', "False"),
        capacity_is_no_multiple=("+ multiple - 1) // multiple * multiple", ")"),
        halves_are_rounded_up=("slots = round(exact)", "slots = math.floor(exact + 0.5)"),
    ),
    *of(
        "moe/gates/gshard_top_2.py",
        "moe/gates/test_gshard_top_2.py",
        second_expert_is_kept_by_another_rule=(
            "share_T1 > self.threshold * drawn_T1",
            "share_T1 > drawn_T1",
        ),
        second_expert_left_out_keeps_its_weight=(
            "return weights_TK * taken_TK, experts_TK",
            "return weights_TK, experts_TK",
        ),
        second_expert_left_out_is_dispatched=(
            "experts_TK = ops.select(taken_TK > 0.0, experts_TK, nobody_TK)",
            "nobody_TK = nobody_TK",
        ),
        second_expert_sampled_may_be_the_first=(
            "others_TE = ops.select(is_first_TE > 0.0, ops.full_like(noisy_TE, -np.inf), noisy_TE)",
            "others_TE = noisy_TE",
        ),
        second_expert_is_judged_before_the_sum=(
            "self.taken(ops.stop_gradient(shares_TK[:, 1:])",
            "self.taken(ops.stop_gradient(probs_TE[:, 1:2])",
        ),
    ),
    *of(
        "moe/gates/switch_top_1.py",
        "moe/gates/test_switch_top_1.py",
        sampled_expert_is_weighted_with_noise=(
            "probs_TE = _softmax(logits_TE)",
            "probs_TE = _softmax(noisy_TE)",
        ),
        evaluation_samples_no_expert_in_training=("or context is None", "or True"),
    ),
    *of(
        "moe/gates/noise.py",
        "moe/gates/test_noise.py",
        jitter_is_half=("2.0 * noise * drawn_TH", "noise * drawn_TH"),
        gumbel_is_upside_down=("return -ops.log(-ops.log(", "return ops.log(-ops.log("),
    ),
    *of(
        "moe/gates/base.py",
        "moe/gates/test_noise.py",
        second_choices_come_first=("_range(K - 1, -1, -1)", "_range(0, K, 1)"),
        draws_of_all_purposes_are_one=("Tensor(-1 - draws, ms.int32)", "Tensor(-1, ms.int32)"),
    ),
    *of(
        "moe/losses.py",
        "moe/test_losses.py",
        aux_loss_is_one_when_balanced=(
            "return num_experts * _sum((_sum(scores_LE",
            "return _sum((_sum(scores_LE",
        ),
        padding_counts_in_the_aux_loss=(
            "_sum(scores_TE * valid_T.reshape(-1, 1), 0)",
            "_sum(scores_TE, 0)",
        ),
        first_choices_are_all_choices=(
            "experts_TK, K = experts_TK[:, :1], 1",
            "K = 1",
        ),
        shares_are_not_divided=(
            "experts_TK.shape[-1] if routing.aux_normalize",
            "1 if routing.aux_normalize",
        ),
        padding_counts_in_the_z_loss=("log_z_T * log_z_T * valid_T", "log_z_T * log_z_T"),
        z_loss_without_a_square=("_sum(log_z_T * log_z_T", "_sum(log_z_T"),
        layers_are_added_not_averaged=(
            "(counted_LE / tokens_L1)) / layers",
            "(counted_LE / tokens_L1))",
        ),
    ),
    *of(
        "training/clipping.py",
        "training/test_clipping.py",
        small_gradients_are_scaled_up=("ops.minimum(self.limit", "ops.maximum(self.limit"),
        the_norm_is_not_unscaled=("ops.sqrt(square) * unscale", "ops.sqrt(square)"),
        gradients_are_not_unscaled=("return scale * unscale", "return scale * 1.0"),
        norms_are_squares=("norms_n = ops.sqrt(squares_n)", "norms_n = squares_n"),
    ),
    *of(
        "training/lr_scheduler.py",
        "training/test_lr_scheduler.py",
        warm_up_starts_at_zero=("peak * (step + 1) / warmup", "peak * step / warmup"),
        the_floor_is_ignored=("lowest + (1.0 - lowest) *", "0.0 + 1.0 *"),
        the_last_step_is_not_the_floor=(
            "config.last_step - 1 - warmup",
            "config.last_step - warmup",
        ),
    ),
    *of(
        "training/loss_scale.py",
        "training/test_loss_scale.py",
        scale_grows_one_update_late=("self.good + 1 >= config", "self.good >= config"),
        scale_falls_below_its_minimum=(
            "max(self.value / FACTOR, config.minimum)",
            "self.value / FACTOR",
        ),
    ),
    *of(
        "weights/attention.py",
        "parallel/test_slices.py",
        rows_instead_of_columns_of_the_output_projection=(
            'Cut("mp", 1, G)',
            'Cut("mp", 0, G)',
        ),
    ),
    *of(
        "parallel/topology/slices.py",
        "parallel/test_slices.py",
        experts_are_not_divided=('if cut.by == "mp" else sizes.ep', 'if cut.by == "mp" else 1'),
        expert_gradients_over_all_ranks=(
            "GroupKind.EXPERT_DATA if spec.stacked",
            "GroupKind.DATA if spec.stacked",
        ),
    ),
    *of(
        "parallel/topology/coords.py",
        "parallel/test_topology.py",
        tensor_ranks_are_not_neighbours=(
            "above, mp = divmod(rank, MP)\n            pp, dp = divmod(above, DP)",
            "above, dp = divmod(rank, DP)\n            pp, mp = divmod(above, MP)",
        ),
        expert_groups_are_strided=(
            "dp % EP, dp // EP, node",
            "dp // (DP // EP), dp % (DP // EP), node",
        ),
    ),
    *of(
        "parallel/pipeline/schedule.py",
        "parallel/pipeline/test_schedule.py",
        one_micro_batch_more_in_flight=("stages - stage)", "stages - stage + 1)"),
    ),
    *of(
        "parallel/pipeline/stages.py",
        "parallel/pipeline/test_stages.py",
        the_head_costs_nothing=("if stage == self.stages - 1 else 0.0)", "if stage < 0 else 0.0)"),
    ),
    *of(
        "checkpoint/manifest.py",
        "checkpoint/test_native.py",
        "checkpoint/test_bad_native.py",
        "checkpoint/test_layout.py",
        sizes_are_not_compared=("if size != record.size:", "if size < 0:"),
    ),
    *of(
        "checkpoint/boxes.py",
        "checkpoint/test_parts.py",
        gaps_between_parts_are_allowed=("if held != math.prod(pieces.shape):", "if False:"),
    ),
    *of(
        "inference/scheduler.py",
        "inference/test_scheduler.py",
        a_slot_that_holds_nan_is_used_again=(
            "if held is None and row not in self._tainted:",
            "if held is None:",
        ),
        a_cancelled_sequence_keeps_its_slot=(
            "                self._tainted.add(row)\n            self._release(row)",
            "                self._tainted.add(row)",
        ),
        prompts_take_more_room_than_there_is=(
            "min(count, shape.columns, room)",
            "min(count, shape.columns)",
        ),
        tokens_of_a_prompt_are_sampled=("if sequence.cached == sequence.length:", "if True:"),
    ),
    *of(
        "inference/steps.py",
        "models/test_next_token_logits.py",
        packed_tokens_are_in_other_places=(
            "places_T[here] = np.arange(len(here))",
            "places_T[here] = np.arange(len(here))[::-1]",
        ),
    ),
]
