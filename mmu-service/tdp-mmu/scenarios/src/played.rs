//! Rows that no line of a table can play: functions.
//!
//! Some need a hand inside, at a state that no sequence of calls reaches; they are tests of the
//! core's own modules. Others are two sides at once: one is held in the middle of a call, or both
//! run freely, and what holds under every schedule is checked. The latter are the bodies that
//! `interleavings/` explores.

use tdp_mmu::Mode;

use super::concurrent::{building, faults, running};
use crate::common::{direct_pairs, pairs, witness};
use crate::mmu::{change, mirror, roots};
use crate::vm;

/// How often two threads that run freely play their scenario.
const ROUNDS: usize = 32;

/// A row that is a function.
pub(crate) struct Played {
    /// Name of the function: the id, then the title.
    name: &'static str,
    play: Play,
}

#[derive(Clone, Copy)]
enum Play {
    /// Step by step.
    Steps(fn()),
    /// Two threads on a TD.
    Pair(fn(Mode)),
    /// Two threads on an ordinary VM.
    DirectPair(fn()),
}

macro_rules! played {
    ($($play:ident($($part:ident)::+)),+ $(,)?) => {
        [$(Played {
            name: stringify!($($part)::+),
            play: Play::$play($($part)::+),
        }),+]
    };
}

pub(crate) const ALL: [Played; 60] = played![
    Steps(vm::tests::r07_a_root_of_another_level_is_not_shown_to_the_module),
    Steps(roots::tests::r09_valid_types_skip_a_root_that_is_being_zapped),
    Steps(roots::tests::r10_types_with_invalid_visit_it_too),
    Steps(roots::tests::r11_invalid_alone_names_no_kind_of_root),
    Steps(roots::tests::r12_filters_choose_root_types),
    Steps(roots::tests::r13_the_last_reference_of_a_valid_root_is_a_bug),
    Steps(vm::tests::r15_a_vcpu_that_goes_puts_both_roots),
    Steps(vm::tests::d10_a_slot_on_its_way_out_is_retried_and_refuses_prefault),
    Steps(vm::tests::d15_a_frame_with_the_shared_bit_is_a_bug),
    Steps(vm::tests::d16_faults_on_an_obsolete_direct_root_start_over),
    Steps(change::tests::d17_a_walk_above_the_shared_bit_visits_nothing),
    Steps(vm::tests::p16_a_goal_above_4k_is_refused_by_the_leaf_hook),
    Steps(vm::tests::z28_a_generation_that_comes_round_zaps_everything_shared),
    Pair(pairs::c01_two_vcpus_on_one_frame_map_it_once),
    Pair(pairs::c02_two_vcpus_on_two_frames_of_one_table_link_it_once),
    Steps(faults::c03_nobody_builds_below_an_entry_whose_table_is_on_its_way),
    Pair(pairs::c04_a_busy_table_is_linked_by_whoever_comes_next),
    Steps(mirror::tests::c05_whoever_loses_an_entry_gives_its_table_back_and_calls_nobody),
    Steps(faults::c06_a_fault_ahead_of_a_conversion_is_mapped_and_taken_away),
    Steps(faults::c07_a_fault_behind_a_conversion_leaves_with_a_memory_fault),
    Pair(pairs::c08_a_conversion_beside_the_frame_only_delays_the_fault),
    Steps(vm::tests::c09_a_fault_outside_an_invalidation_goes_on),
    Steps(vm::tests::c10_a_fault_between_two_ranges_of_one_invalidation_starts_over),
    Pair(pairs::c11_no_leaf_stays_on_a_page_that_a_hole_freed),
    Steps(running::c12_no_vcpu_enters_between_a_refused_call_and_its_retry),
    Steps(running::c13_a_guest_call_that_holds_the_tree_is_interrupted_for_a_zap),
    Steps(faults::c14_a_fault_beside_the_zero_step_defence_is_busy_and_retried_in_the_host),
    DirectPair(direct_pairs::c15_the_fast_path_and_a_zap_do_not_lose_each_other),
    DirectPair(direct_pairs::c16_two_vcpus_split_a_huge_leaf_once),
    DirectPair(direct_pairs::c17_a_fault_in_a_table_that_becomes_a_leaf_loses_nothing),
    Pair(pairs::c18_two_conversions_take_each_page_once),
    Steps(building::c19_what_concerns_the_whole_td_waits_for_a_vcpu_that_runs),
    Steps(vm::tests::c20_a_fault_in_local_retry_lets_the_deletion_of_its_slot_pass),
    Steps(vm::tests::c21_a_fault_in_local_retry_ends_with_the_vm),
    Steps(vm::tests::c22_a_root_that_becomes_obsolete_is_replaced_on_the_next_entry),
    Steps(vm::tests::c23_a_removed_table_is_not_reused_while_somebody_walks_it),
    Steps(building::c24_a_hole_waits_for_a_vcpu_that_is_initialised),
    Steps(building::c25_a_hole_waits_for_the_population_of_its_page),
    Steps(building::c26_building_waits_for_a_vcpu_that_loads_its_roots),
    Steps(running::c27_an_exit_of_the_zero_step_defence_is_a_fault_like_any_other),
    Steps(vm::tests::i19_an_error_on_the_way_in_is_refused),
    Steps(vm::tests::i21_a_leaf_before_finalisation_needs_a_source_page),
    Steps(vm::map_gpa::tests::m01_two_mib_are_one_exit),
    Steps(vm::map_gpa::tests::m02_five_mib_are_three_exits),
    Steps(vm::map_gpa::tests::m03_an_event_cuts_the_conversion_short),
    Steps(vm::map_gpa::tests::m04_a_failure_names_the_chunk),
    Steps(vm::map_gpa::tests::m05_without_the_exit_the_call_is_unsupported),
    Steps(vm::map_gpa::tests::m06_a_range_that_cannot_be_is_an_invalid_operand),
    Steps(vm::map_gpa::tests::m07_an_unaligned_range_is_an_alignment_error),
    Steps(vm::tests::t07_a_leaf_left_behind_the_key_is_a_bug),
    Steps(change::tests::x01_an_atomic_change_of_a_present_mirror_leaf_bugs_and_goes_on),
    Steps(change::tests::x02_an_atomic_zap_of_a_mirror_leaf_is_refused),
    Steps(vm::tests::x03_a_mirror_leaf_made_present_by_force_loses_the_old_page),
    Steps(vm::tests::x04_a_private_table_is_not_freed_while_a_key_is_assigned),
    Steps(change::tests::x05_an_atomic_zap_of_a_mirror_table_is_refused),
    Steps(change::tests::x06_a_leaf_that_changes_its_page_stops_a_host),
    Steps(change::tests::x07_a_table_of_another_level_or_frame_is_warned_about),
    Steps(change::tests::x08_a_mirror_table_without_a_page_bugs_the_vm),
    Steps(change::tests::x09_a_huge_mirror_leaf_is_never_split),
    Steps(change::tests::x10_nothing_to_nothing_is_warned_about),
];

impl Played {
    /// As in `X03`.
    pub(crate) fn id(&self) -> String {
        self.words().next().unwrap_or_default().to_uppercase()
    }

    pub(crate) fn title(&self) -> String {
        self.words().skip(1).collect::<Vec<_>>().join(" ")
    }

    fn words(&self) -> impl Iterator<Item = &'static str> {
        let name = self.name.rsplit("::").next().unwrap_or(self.name);
        name.trim().split('_')
    }

    /// Plays it in the mode that the witness has been told. Panics when it does not do what it
    /// says.
    pub(crate) fn play(&self, mode: Mode) {
        match self.play {
            Play::Steps(play) => play(),
            Play::Pair(play) => again_and_again(|| play(mode)),
            Play::DirectPair(play) => again_and_again(play),
        }
    }
}

/// Shows the last round.
fn again_and_again(play: impl Fn()) {
    for _ in 0..ROUNDS {
        witness::take();
        play();
    }
}
