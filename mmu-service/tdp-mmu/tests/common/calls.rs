//! Calls in short: `SA3 SA2 SA1 AUG`, `(BLK TRK RMV WBP)*512`, `AUG(busy)`, `KFR(err)`.

use tdx_defs::Leaf;

use super::port::Call;

const NAMES: [(&str, Leaf); 26] = [
    ("AUG", Leaf::MEM_PAGE_AUG),
    ("ADD", Leaf::MEM_PAGE_ADD),
    ("SA", Leaf::MEM_SEPT_ADD),
    ("EXT", Leaf::MR_EXTEND),
    ("FIN", Leaf::MR_FINALIZE),
    ("BLK", Leaf::MEM_RANGE_BLOCK),
    ("TRK", Leaf::MEM_TRACK),
    ("RMV", Leaf::MEM_PAGE_REMOVE),
    ("WBP", Leaf::PHYMEM_PAGE_WBINVD),
    ("RCL", Leaf::PHYMEM_PAGE_RECLAIM),
    ("CWB", Leaf::PHYMEM_CACHE_WB),
    ("VPF", Leaf::VP_FLUSH),
    ("VFD", Leaf::MNG_VPFLUSHDONE),
    ("KFR", Leaf::MNG_KEY_FREEID),
    ("KCF", Leaf::MNG_KEY_CONFIG),
    ("MCR", Leaf::MNG_CREATE),
    ("MAC", Leaf::MNG_ADDCX),
    ("MIN", Leaf::MNG_INIT),
    ("MRD", Leaf::MNG_RD),
    ("VCR", Leaf::VP_CREATE),
    ("VAC", Leaf::VP_ADDCX),
    ("VIN", Leaf::VP_INIT),
    ("VWR", Leaf::VP_WR),
    ("VRD", Leaf::VP_RD),
    ("RD", Leaf::MEM_SEPT_RD),
    ("WBT", Leaf::PHYMEM_PAGE_WBINVD),
];

/// The leaf of a short name.
pub(crate) fn leaf(name: &str) -> Leaf {
    let found = NAMES.iter().find(|(short, _)| *short == name);
    found.unwrap_or_else(|| panic!("{name} names no call")).1
}

/// A call as the tables write it.
pub(crate) fn short(call: &Call, global_hkid: u64, hkid_shift: u32) -> String {
    let name = NAMES
        .iter()
        .find(|(_, leaf)| *leaf == call.leaf)
        .map_or("?", |(name, _)| name);
    let name = match call.leaf {
        // TDX level of the entry.
        Leaf::MEM_SEPT_ADD => format!("SA{}", call.rcx & 7),
        // From the start, or resumed.
        Leaf::PHYMEM_CACHE_WB => format!("CWB{}", call.rcx),
        // The page under the module's own key is the TDR.
        Leaf::PHYMEM_PAGE_WBINVD if call.rcx >> hkid_shift == global_hkid => "WBT".into(),
        _ => name.to_owned(),
    };
    let status = call.status;
    match (status.is_busy(), status.is_error()) {
        (true, _) => format!("{name}(busy)"),
        (false, true) => format!("{name}(err)"),
        (false, false) => name,
    }
}

/// The calls that a line of a table stands for.
pub(crate) fn expand(text: &str) -> Vec<String> {
    let text = text.trim();
    if text == "none" {
        return Vec::new();
    }
    let mut calls = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (item, after) = match rest.strip_prefix('(') {
            Some(inner) => inner.split_once(')').expect("a closing parenthesis"),
            None => rest.split_at(rest.find([' ', '*']).unwrap_or(rest.len())),
        };
        let (times, after) = match after.strip_prefix('*') {
            Some(count) => {
                let end = count.find(' ').unwrap_or(count.len());
                (count[..end].parse().expect("a count"), &count[end..])
            }
            None => (1, after),
        };
        let group: Vec<String> = item.split_whitespace().map(Into::into).collect();
        calls.extend(std::iter::repeat_n(group, times).flatten());
        rest = after.trim_start();
    }
    calls
}

/// Neighbours that repeat folded, for messages.
pub(crate) fn fold(calls: &[String]) -> String {
    let mut parts: Vec<(String, usize)> = Vec::new();
    for call in calls {
        match parts.last_mut() {
            Some((last, count)) if last == call => *count += 1,
            _ => parts.push((call.clone(), 1)),
        }
    }
    let shown = parts.iter().take(60).map(|(call, count)| match count {
        1 => call.clone(),
        _ => format!("{call}*{count}"),
    });
    shown.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[test]
fn groups_expand() {
    let calls = expand("SA1 AUG(busy) (BLK TRK)*2 RCL*3");
    assert_eq!(calls.join(" "), "SA1 AUG(busy) BLK TRK BLK TRK RCL RCL RCL");
    assert_eq!(fold(&expand("SA1 RCL*3")), "SA1 RCL*3");
}
