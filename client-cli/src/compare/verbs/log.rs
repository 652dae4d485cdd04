//! The dirty log: KVM_GET_DIRTY_LOG beside what was recorded of it, and KVM_CLEAR_DIRTY_LOG.

use mirror_proto::mmu::{ClearDirtyLogRequest, GetDirtyLogRequest};

use super::{Context, Done};
use crate::commands::tables::pages_of;
use crate::compare::arguments::{self, argument};
use crate::compare::report::Difference;
use crate::compare::service::call;
use crate::compare::stimuli;
use crate::error::Error;

/// Words of one bitmap.
const MAX_WORDS: u64 = 1 << 20;

pub(super) async fn get_dirty_log(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let slot_id = u32::try_from(number!(step, "slot", "slot_id", "id")).unwrap_or(u32::MAX);
    let message = GetDirtyLogRequest {
        vm_id: vm.vm_id,
        slot_id,
    };
    let answer = call!(vm.client, "GetDirtyLog", get_dirty_log, message)?;
    let difference = match (&answer, step.note("DIRTY")) {
        (Ok(log), Some(note)) => dirty_difference(note, &log.bitmap),
        _ => None,
    };
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done {
        difference,
        ..Done::of(answer).with(effects)
    })
}

fn dirty_difference(note: &str, bitmap: &[u64]) -> Option<Difference> {
    let found = pages_of(bitmap);
    let value = |key| argument(note, key);
    let count = value("count").and_then(arguments::number);
    if let Some(count) = count.filter(|count| *count != found.len() as u64) {
        return Some(Difference::new("dirty pages", count, found.len()));
    }
    let listed = value("pages")?.split(',').filter(|page| !page.is_empty());
    let listed: Option<Vec<u64>> = listed
        .map(|page| u64::from_str_radix(page, 16).ok())
        .collect();
    // A list that was cut short has its count.
    let listed = listed.filter(|listed| count.is_none_or(|count| listed.len() as u64 == count))?;
    let first = listed
        .iter()
        .zip(&found)
        .find(|(listed, found)| listed != found);
    let (listed, found) = first?;
    Some(Difference::new(
        "dirty page",
        format!("{listed:x}"),
        format!("{found:x}"),
    ))
}

pub(super) async fn clear_dirty_log(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let slot_id = u32::try_from(number!(step, "slot", "slot_id", "id")).unwrap_or(u32::MAX);
    let first_page = readable!(step.optional(&["first_page", "first", "offset", "start"]));
    let first_page = first_page.unwrap_or(0);
    let num_pages = number!(step, "num_pages", "num", "npages", "count", "pages");
    let words = num_pages.div_ceil(64);
    if words > MAX_WORDS {
        return Ok(Done::skip(format!(
            "{num_pages} pages are above the limit of {}",
            MAX_WORDS * 64
        )));
    }
    let mut bitmap = vec![u64::MAX; usize::try_from(words).unwrap_or(0)];
    let rest = num_pages % 64;
    if let (Some(last), 1..) = (bitmap.last_mut(), rest) {
        *last = (1 << rest) - 1;
    }
    // The program may have set some bits only.
    let given = step.field("bitmap").or_else(|| step.field("mask"));
    if let Some(given) = given {
        let Some(bits) = arguments::number(given) else {
            return Ok(Done::unreadable(format!(
                "bitmap: {given:.40} is no number"
            )));
        };
        for (at, word) in bitmap.iter_mut().enumerate() {
            *word &= if at == 0 { bits } else { 0 };
        }
    }
    let message = ClearDirtyLogRequest {
        vm_id: vm.vm_id,
        slot_id,
        first_page,
        bitmap,
        num_pages,
    };
    let answer = call!(vm.client, "ClearDirtyLog", clear_dirty_log, message)?;
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done::of(answer).with(effects))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_log_is_compared_by_count_and_by_page() {
        for (note, bitmap, what) in [
            ("slot=1 count=2 pages=20,21", vec![3 << 32], None),
            (
                "slot=1 count=3 pages=20,21",
                vec![3 << 32],
                Some("dirty pages"),
            ),
            (
                "slot=1 count=2 pages=20,22",
                vec![3 << 32],
                Some("dirty page"),
            ),
            ("slot=1 count=2 pages=20,...", vec![3 << 32], None),
            ("slot=1 count=0 pages=", vec![0], None),
            ("slot=1", vec![1], None),
        ] {
            let found = dirty_difference(note, &bitmap).map(|difference| difference.what);
            assert_eq!(found.as_deref(), what, "{note}");
        }
    }
}
