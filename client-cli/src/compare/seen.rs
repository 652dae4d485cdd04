//! An event as far as a recording and the model can be compared.
//!
//! The key is what must be equal; page numbers are names and stand beside it. Stimuli, what the
//! guest and the host's memory management did, are not compared: they are played.

use super::spte::{Format, Spte};
use crate::trace::hex;

/// KVM_PFN_NOSLOT and the error pages have this bit.
const NO_PAGE: u64 = 1 << 63;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// All but page numbers.
    pub(super) key: String,
    pub(super) pages: Vec<Page>,
}

/// A page number in an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) frame: u64,
    /// Whether the event says what the page is from now on, and how many follow; else it is one
    /// that was named before.
    pub(super) defines: Option<u64>,
}

/// Words of an event's text.
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    /// The word behind a word.
    fn after(&self, key: &str) -> Option<&'a str> {
        let mut words = self.0.split_whitespace().skip_while(|word| *word != key);
        words.nth(1)
    }

    fn hex(&self, key: &str) -> Option<u64> {
        hex("", self.after(key)?).ok()
    }

    fn has(&self, word: &str) -> bool {
        self.0.split_whitespace().any(|other| other == word)
    }
}

/// Frames under an entry of a level.
fn span(level: u64) -> u64 {
    1 << (9 * level.clamp(1, 5).saturating_sub(1))
}

fn defined(spte: Spte, level: u64) -> Option<Page> {
    let span = match spte.kind {
        super::spte::Kind::Leaf(_) => span(level),
        _ => 1,
    };
    spte.page.map(|frame| Page {
        frame,
        defines: Some(span),
    })
}

fn used(spte: Spte) -> Option<Page> {
    spte.page.map(|frame| Page {
        frame,
        defines: None,
    })
}

/// Reads an event. `None` when it is not one that is compared; an error names a form that is not
/// known.
pub(super) fn seen(format: Format, name: &str, text: &str) -> Option<Result<Seen, String>> {
    let read: fn(Format, &Words<'_>) -> Option<Seen> = match name {
        "kvm_tdp_mmu_spte_changed" => changed,
        "kvm_mmu_spte_requested" => requested,
        "kvm_mmu_set_spte" => set,
        "kvm_mmu_get_page" => get_page,
        "kvm_mmu_prepare_zap_page" => prepare_zap,
        "fast_page_fault" => fast,
        "kvm_mmu_split_huge_page" => split,
        "mark_mmio_spte" => mark_mmio,
        "check_mmio_spte" => check_mmio,
        _ => return None,
    };
    let seen = read(format, &Words(text));
    Some(seen.ok_or_else(|| format!("{name}: {text:.80} has no form that is known")))
}

fn changed(format: Format, words: &Words<'_>) -> Option<Seen> {
    let (gfn, level) = (words.hex("gfn")?, words.hex("level")?);
    let old = format.decode(words.hex("old_spte")?, level);
    let new = format.decode(words.hex("new_spte")?, level);
    // A changed leaf keeps what hardware had set in it.
    let kept = matches!(old.kind, super::spte::Kind::Leaf(_));
    let new_text = if kept { new.old_text() } else { new.new_text() };
    Some(Seen {
        key: format!(
            "spte_changed gfn {gfn:x} level {level} {} -> {new_text}",
            old.old_text()
        ),
        pages: used(old).into_iter().chain(defined(new, level)).collect(),
    })
}

fn requested(_: Format, words: &Words<'_>) -> Option<Seen> {
    let (gfn, level, pfn) = (words.hex("gfn")?, words.hex("level")?, words.hex("pfn")?);
    let page = (pfn & NO_PAGE == 0).then_some(Page {
        frame: pfn,
        defines: Some(1),
    });
    let no_page = if page.is_none() { " no page" } else { "" };
    Some(Seen {
        key: format!("spte_requested gfn {gfn:x} level {level}{no_page}"),
        pages: page.into_iter().collect(),
    })
}

fn set(format: Format, words: &Words<'_>) -> Option<Seen> {
    let (gfn, level) = (words.hex("gfn")?, words.hex("level")?);
    let spte = format.decode(words.hex("spte")?, level);
    let (_, rights) = words.0.split_once('(')?;
    let (rights, _) = rights.split_once(')')?;
    Some(Seen {
        key: format!(
            "set_spte gfn {gfn:x} level {level} ({rights}) {}",
            spte.new_text()
        ),
        pages: defined(spte, level).into_iter().collect(),
    })
}

/// `sp gen 0 gfn 10000 l1 …`: the access word has three letters or four, and says nothing here.
fn table(words: &Words<'_>) -> Option<String> {
    let gfn = words.hex("gfn")?;
    let mut levels = words
        .0
        .split_whitespace()
        .filter_map(|word| word.strip_prefix('l'));
    let level: u64 = levels.find_map(|level| level.parse().ok())?;
    let root = words.after("root")?;
    let direct = if words.has("direct") {
        ""
    } else {
        " not direct"
    };
    let invalid = if words.has("invalid") { " invalid" } else { "" };
    Some(format!(
        "gfn {gfn:x} level {level} root {root}{direct}{invalid}"
    ))
}

fn get_page(_: Format, words: &Words<'_>) -> Option<Seen> {
    let state = if words.has("new") { "new" } else { "existing" };
    Some(Seen {
        key: format!("get_page {} {state}", table(words)?),
        pages: Vec::new(),
    })
}

fn prepare_zap(_: Format, words: &Words<'_>) -> Option<Seen> {
    Some(Seen {
        key: format!("prepare_zap_page {}", table(words)?),
        pages: Vec::new(),
    })
}

fn fast(format: Format, words: &Words<'_>) -> Option<Seen> {
    // The level is not printed. Hardware may have set bits in both values, so only write access
    // counts; bit 1 means it in both forms.
    let write = |key| words.hex(key).map(|spte| spte & 2 != 0);
    let letters = words.after("error_code")?.split('|');
    // Both set the bit for "user" at will, and what the walk was is no right.
    let rights: Vec<&str> = letters
        .filter(|name| matches!(*name, "P" | "W" | "F" | "RSVD"))
        .collect();
    let _ = format;
    Some(Seen {
        key: format!(
            "fast_page_fault vcpu {} gva {:x} {} write {} -> {} spurious {} fixed {}",
            words.after("vcpu")?,
            words.hex("gva")?,
            rights.join("|"),
            u8::from(write("old")?),
            u8::from(write("new")?),
            words.after("spurious")?,
            words.after("fixed")?,
        ),
        pages: Vec::new(),
    })
}

fn split(format: Format, words: &Words<'_>) -> Option<Seen> {
    let (gfn, level) = (words.hex("gfn")?, words.hex("level")?);
    let spte = format.decode(words.hex("spte")?, level);
    Some(Seen {
        key: format!(
            "split_huge_page gfn {gfn:x} level {level} {} errno {}",
            spte.old_text(),
            words.after("errno")?
        ),
        pages: used(spte).into_iter().collect(),
    })
}

fn mark_mmio(_: Format, words: &Words<'_>) -> Option<Seen> {
    Some(Seen {
        key: format!(
            "mark_mmio_spte gfn {:x} gen {:x}",
            words.hex("gfn")?,
            words.hex("gen")?
        ),
        pages: Vec::new(),
    })
}

fn check_mmio(_: Format, words: &Words<'_>) -> Option<Seen> {
    Some(Seen {
        key: format!(
            "check_mmio_spte kvm_gen {:x} spte-gen {:x} valid {}",
            words.hex("kvm_gen")?,
            words.hex("spte-gen")?,
            words.after("valid")?
        ),
        pages: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(format: Format, name: &str, text: &str) -> String {
        seen(format, name, text).unwrap().unwrap().key
    }

    #[test]
    fn kernels_and_processors_print_the_same_event_in_their_own_way() {
        for (name, npt, ept) in [
            (
                "kvm_tdp_mmu_spte_changed",
                "as id 0 gfn 1 level 1 old_spte 8000000000000000 new_spte 147662e67",
                "as id 0 gfn 1 level 1 old_spte 0 new_spte 600000147662b37",
            ),
            (
                "kvm_mmu_spte_requested",
                "gfn 1 pfn 147662 level 1",
                "gfn 1 pfn 147662 level 1 access f",
            ),
            (
                "kvm_mmu_set_spte",
                "gfn 1 spte 147662e67 (rwxu) level 1 at 146cd0008",
                "gfn 1 spte 600000147662b37 (rwxu) level 1 at 5008",
            ),
            (
                "kvm_mmu_get_page",
                "sp gen 0 gfn 10000 l1 8-byte q0 direct wux nxe ad root 0 sync new",
                "sp gen 0 gfn 10000 l1 8-byte q0 direct rwux !nxe ad root 0 sync new",
            ),
            (
                "fast_page_fault",
                "vcpu 0 gva 10003000 error_code P|W|U|0x100000000 sptep 00000000a88e1168 old 0x3cce825 new 3cce827 spurious 0 fixed 1",
                "vcpu 0 gva 10003000 error_code P|W sptep 0 old 0x3cce805 new 3cce807 spurious 0 fixed 1",
            ),
            (
                "kvm_mmu_split_huge_page",
                "gfn 10000 spte 148000ee7 level 2 errno 0",
                "gfn 10000 spte 600000148000bb7 level 2 errno 0",
            ),
        ] {
            assert_eq!(
                key(Format::Npt, name, npt),
                key(Format::Ept, name, ept),
                "{name}"
            );
        }
    }

    #[test]
    fn other_events_are_left_out_and_broken_ones_are_named() {
        assert_eq!(seen(Format::Npt, "kvm_exit", "reason x"), None);
        let broken = seen(Format::Npt, "kvm_mmu_set_spte", "gfn 1 spte zz (r");
        assert!(broken.unwrap().unwrap_err().contains("kvm_mmu_set_spte"));
    }
}
