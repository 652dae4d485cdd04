//! `dirty-log`, `age`, `zap` and `zap-fast`.

use mirror_proto::mmu::{
    AgeRangeRequest, ClearDirtyLogRequest, GetDirtyLogRequest, SetDirtyLogRequest,
    ZapAllFastRequest, ZapAllRequest, ZapRangeRequest,
};
use serde_json::json;

use crate::args::{AgeArgs, DirtyLogClearArgs, DirtyLogCommand, DirtyLogGetArgs, DirtyLogSetArgs};
use crate::args::{ZapArgs, ZapFastArgs};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, hex, merge, pairs};
use crate::tally::Tally;

/// Pages of one word of a bitmap.
const WORD: u64 = 64;
/// Pages that a clear names in one message: a bitmap of a megabyte.
const CLEAR_PAGES: u64 = 1 << 23;
/// Pages that a table names.
const SHOWN: usize = 64;

/// `mmuctl dirty-log …`.
pub(super) async fn dirty_log(client: &Client, command: &DirtyLogCommand) -> Result<Answer, Error> {
    match command {
        DirtyLogCommand::Get(args) => get(client, args).await,
        DirtyLogCommand::Clear(args) => clear(client, args).await,
        DirtyLogCommand::Set(args) => set(client, args).await,
    }
}

async fn get(client: &Client, args: &DirtyLogGetArgs) -> Result<Answer, Error> {
    let message = GetDirtyLogRequest {
        vm_id: args.vm,
        slot_id: args.slot,
    };
    let log = client
        .long("GetDirtyLog", message, async |mut mmu, request| {
            mmu.get_dirty_log(request).await
        })
        .await?;
    let pages = pages_of(&log.bitmap);
    let mut json = json!({
        "vm_id": args.vm,
        "slot_id": args.slot,
        "dirty": log.dirty,
        "pages": pages,
    });
    merge(&mut json, Tally::of(log.counts.as_ref()).to_json());
    let mut shown: Vec<String> = pages.iter().take(SHOWN).map(|page| hex(*page)).collect();
    if pages.len() > SHOWN {
        shown.push(format!("and {} more", pages.len() - SHOWN));
    }
    let text = format!("{} pages are dirty\n{}", log.dirty, shown.join(" "));
    Ok(Answer::new(json, text))
}

/// The pages whose bits are set, ascending.
pub(crate) fn pages_of(bitmap: &[u64]) -> Vec<u64> {
    let words = (0..).zip(bitmap);
    let bits = words
        .flat_map(|(word, &bits)| (0..WORD).map(move |bit| (word * WORD + bit, bits >> bit & 1)));
    bits.filter(|&(_, set)| set != 0)
        .map(|(page, _)| page)
        .collect()
}

/// The bits of `pages` pages from page `first` on, as messages of bounded size: the page of bit 0,
/// and the words.
pub(crate) fn bitmaps(first: u64, pages: u64) -> impl Iterator<Item = (u64, Vec<u64>)> {
    let end = first.saturating_add(pages);
    let mut from = first - first % WORD;
    std::iter::from_fn(move || {
        let to = end.min(from.saturating_add(CLEAR_PAGES));
        let base = from;
        let word = |at: u64| {
            let bits = |limit: u64| match limit.saturating_sub(at) {
                left if left >= WORD => u64::MAX,
                left => (1 << left) - 1,
            };
            bits(to) & !bits(first)
        };
        let count = to.saturating_sub(base).div_ceil(WORD);
        let words: Vec<u64> = (0..count).map(|at| word(base + at * WORD)).collect();
        from = to;
        (!words.is_empty()).then_some((base, words))
    })
}

async fn clear(client: &Client, args: &DirtyLogClearArgs) -> Result<Answer, Error> {
    let mut tally = Tally::default();
    for (first_page, bitmap) in bitmaps(args.first, args.pages) {
        let message = ClearDirtyLogRequest {
            vm_id: args.vm,
            slot_id: args.slot,
            first_page,
            bitmap,
            num_pages: 0,
        };
        let answer = client
            .long("ClearDirtyLog", message, async |mut mmu, request| {
                mmu.clear_dirty_log(request).await
            })
            .await?;
        tally.add(answer.counts.as_ref());
    }
    let mut json = json!({
        "vm_id": args.vm,
        "slot_id": args.slot,
        "first": args.first,
        "pages": args.pages,
    });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, pairs(tally.rows())))
}

async fn set(client: &Client, args: &DirtyLogSetArgs) -> Result<Answer, Error> {
    let message = SetDirtyLogRequest {
        vm_id: args.vm,
        slot_id: args.slot,
        on: args.on,
    };
    let answer = client
        .long("SetDirtyLog", message, async |mut mmu, request| {
            mmu.set_dirty_log(request).await
        })
        .await?;
    let tally = Tally::of(answer.counts.as_ref());
    let mut json = json!({ "vm_id": args.vm, "slot_id": args.slot, "log_dirty": args.on });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, pairs(tally.rows())))
}

/// `mmuctl age`.
pub(super) async fn age(client: &Client, args: &AgeArgs) -> Result<Answer, Error> {
    let end = args.hva.checked_add(args.size).ok_or_else(|| {
        Error::Usage(format!(
            "hva {:#x} + {:#x} is above 64 bits",
            args.hva, args.size
        ))
    })?;
    let message = AgeRangeRequest {
        vm_id: args.vm,
        start: args.hva,
        end,
        test: args.test,
    };
    let answer = client
        .long("AgeRange", message, async |mut mmu, request| {
            mmu.age_range(request).await
        })
        .await?;
    let json = json!({
        "vm_id": args.vm,
        "hva": hex(args.hva),
        "size": args.size,
        "young": answer.young,
    });
    Ok(Answer::new(
        json,
        if answer.young { "young" } else { "old" },
    ))
}

/// `mmuctl zap`.
pub(super) async fn zap(client: &Client, args: &ZapArgs) -> Result<Answer, Error> {
    let vm_id = args.vm;
    let (Some(gpa), Some(size)) = (args.gpa, args.size) else {
        client
            .long(
                "ZapAll",
                ZapAllRequest { vm_id },
                async |mut mmu, request| mmu.zap_all(request).await,
            )
            .await?;
        return Ok(Answer::new(json!({ "vm_id": vm_id }), "all zapped"));
    };
    let message = ZapRangeRequest { vm_id, gpa, size };
    let answer = client
        .long("ZapRange", message, async |mut mmu, request| {
            mmu.zap_range(request).await
        })
        .await?;
    let tally = Tally::of(answer.counts.as_ref());
    let mut json = json!({ "vm_id": vm_id, "gpa": hex(gpa), "size": size });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, pairs(tally.rows())))
}

/// `mmuctl zap-fast`.
pub(super) async fn zap_fast(client: &Client, args: &ZapFastArgs) -> Result<Answer, Error> {
    let vm_id = args.vm;
    client
        .long(
            "ZapAllFast",
            ZapAllFastRequest { vm_id },
            async |mut mmu, request| mmu.zap_all_fast(request).await,
        )
        .await?;
    Ok(Answer::new(
        json!({ "vm_id": vm_id }),
        "the root is obsolete",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_pages_is_bits_from_a_whole_word_on() {
        for (first, pages, expected) in [
            (0, 0, vec![]),
            (0, 1, vec![(0, vec![1])]),
            (3, 2, vec![(0, vec![0b11000])]),
            (64, 64, vec![(64, vec![u64::MAX])]),
            (70, 60, vec![(64, vec![u64::MAX << 6, 0b11])]),
            (63, 2, vec![(0, vec![1 << 63, 1])]),
        ] {
            let found: Vec<_> = bitmaps(first, pages).collect();
            assert_eq!(found, expected, "{first} {pages}");
        }
        let long: Vec<_> = bitmaps(1, CLEAR_PAGES + 1).collect();
        let all: u64 = long
            .iter()
            .flat_map(|(_, words)| words)
            .map(|word| u64::from(word.count_ones()))
            .sum();
        assert_eq!((long.len(), all), (2, CLEAR_PAGES + 1));
        assert_eq!(long[1], (CLEAR_PAGES, vec![0b11]));
    }

    #[test]
    fn the_bits_of_a_bitmap_are_its_pages() {
        assert_eq!(pages_of(&[0b101, 0, 1 << 63]), [0, 2, 191]);
    }
}
