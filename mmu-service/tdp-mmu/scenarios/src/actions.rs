//! Words that act on slots, shared memory and the host behind it.

use tdp_mmu::{Counts, HostChange, HostPageSize, SlotSpec, Vm, VmError};

use super::world::{bytes, hex, range};
use crate::common::{self, USER_BASE};

fn ok(_: Counts) -> String {
    "ok".into()
}

fn number(word: &str) -> u32 {
    word.parse().unwrap()
}

pub(crate) fn shared(vm: &Vm, words: &[&str]) -> Result<String, VmError> {
    match *words {
        ["slot", kind, id, first, pages] => {
            let (id, first, pages) = (number(id), hex(first), hex(pages));
            let mut flags = kind.split('-');
            let mut spec = match flags.next() {
                Some("gmem") => common::gmem_slot(id, first, pages),
                _ => common::user_slot(id, first, pages),
            };
            for flag in flags {
                match flag {
                    "ro" => spec.read_only = true,
                    "log" => spec.log_dirty = true,
                    "zero" => spec.demand_zero = true,
                    "2m" => spec.host_page_size = HostPageSize::Size2M,
                    "1g" => spec.host_page_size = HostPageSize::Size1G,
                    "skewed" => spec.userspace_addr += 0x1000,
                    _ => panic!("{flag} is no flag of a slot"),
                }
            }
            vm.set_user_memory_region(spec).map(ok)
        }
        ["log", id, on] => {
            let slots = vm.info().slots;
            let spec = *slots
                .iter()
                .find(|slot| slot.slot_id == number(id))
                .unwrap();
            let log_dirty = on == "on";
            vm.set_user_memory_region(SlotSpec { log_dirty, ..spec })
                .map(ok)
        }
        ["move", id, first] => {
            let slots = vm.info().slots;
            let spec = *slots
                .iter()
                .find(|slot| slot.slot_id == number(id))
                .unwrap();
            let gpa = hex(first) << 12;
            vm.set_user_memory_region(SlotSpec { gpa, ..spec }).map(ok)
        }
        ["dirty", id] => {
            let (words, _) = vm.get_dirty_log(number(id))?;
            let pages = (0..words.len() * 64)
                .filter(|page| words[page / 64] >> (page % 64) & 1 != 0)
                .map(|page| format!("{page:x}"));
            Ok(format!("pages {}", pages.collect::<Vec<_>>().join(" "))
                .trim()
                .into())
        }
        ["clear", id, first, mask] => vm
            .clear_dirty_log(number(id), hex(first), &[hex(mask)])
            .map(ok),
        ["zap", first, pages] => {
            let (gpa, size) = bytes(&range(first, pages));
            vm.zap_gfn_range(gpa, size).map(ok)
        }
        ["age", first, pages] => {
            let (start, size) = bytes(&range(first, pages));
            let start = start + USER_BASE;
            vm.age_hva(start, start + size)
                .map(|young| young.to_string())
        }
        ["test-age", gfn] => {
            let hva = USER_BASE + (hex(gfn) << 12);
            vm.test_age_hva(hva).map(|young| young.to_string())
        }
        ["wrprot", gfn] => vm
            .write_protect_gfn(hex(gfn) << 12)
            .map(|(protected, _)| protected.to_string()),
        ["track", gfn, on] => vm.track_writes(hex(gfn) << 12, on == "on").map(ok),
        ["nx", on] => vm.set_nx_huge_pages(on == "on").map(|()| "ok".into()),
        ["recover-nx", most] => vm
            .recover_nx_huge_pages(number(most))
            .map(|(zapped, _)| zapped.to_string()),
        ["access", how, gfn] => {
            let gpa = common::shared(vm, hex(gfn)).gpa;
            vm.access(gpa, how == "write").map(|done| done.to_string())
        }
        ["host", first, pages, how] => {
            let (start, size) = bytes(&range(first, pages));
            let start = start + USER_BASE;
            let change = match how {
                "zero" => HostChange::DropToZero,
                "ro" => HostChange::ReadOnly,
                "rw" => HostChange::ReadWrite,
                "none" => HostChange::NoAccess,
                "2m" => HostChange::PageSize(HostPageSize::Size2M),
                _ => panic!("{how} is no change of the host's"),
            };
            vm.change_host_mapping(start, start + size, change).map(ok)
        }
        ["protect", id] => vm.write_protect_slot(number(id)).map(ok),
        _ => panic!("{words:?} is no action"),
    }
}
