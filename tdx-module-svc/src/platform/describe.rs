//! The platform on the wire.

use mirror_proto::module::{GetPlatformResponse, PageCount, ReservedArea, Tdmr as WireTdmr};
use tdx_module::{Module, Tdmr};

use crate::config::{Limits, release_name};

/// The platform, what of it is in use, and what one request may ask for.
pub(crate) fn describe(module: &Module, limits: &Limits, instance: &str) -> GetPlatformResponse {
    let config = module.config();
    let usage = module.usage();
    GetPlatformResponse {
        instance: instance.to_owned(),
        release: release_name(config.release).to_owned(),
        tdmrs: config.tdmrs.iter().map(tdmr_to_wire).collect(),
        hkid_start: config.hkid_start.into(),
        hkid_count: config.hkid_count.into(),
        global_hkid: config.global_hkid.into(),
        maxpa: config.maxpa.into(),
        hkid_bits: config.hkid_bits.into(),
        logical_processors: config.logical_processors,
        packages: config.packages,
        tdcs_pages: config.tdcs_pages.into(),
        tdvps_pages: config.tdvps_pages.into(),
        attributes_fixed0: config.attributes.fixed0,
        attributes_fixed1: config.attributes.fixed1,
        xfam_fixed0: config.xfam.fixed0,
        xfam_fixed1: config.xfam.fixed1,
        hkids_in_use: usage.hkids_in_use,
        pages: usage
            .pages
            .iter()
            .map(|(page_type, pages)| PageCount {
                page_type: page_type.0.into(),
                name: page_type.to_string(),
                pages_4k: *pages,
            })
            .collect(),
        max_calls: limits.max_calls,
        max_repeat: limits.max_repeat,
        max_message_bytes: limits.max_message_bytes,
        replay_window: limits.replay_window,
        five_level: config.five_level,
        max_session_replay_bytes: limits.max_session_replay_bytes,
    }
}

fn tdmr_to_wire(tdmr: &Tdmr) -> WireTdmr {
    WireTdmr {
        base: tdmr.base.get(),
        size: tdmr.size,
        reserved: tdmr
            .reserved
            .iter()
            .map(|area| ReservedArea {
                base: area.start,
                size: area.end.saturating_sub(area.start),
            })
            .collect(),
        initialized: tdmr.initialized,
    }
}
