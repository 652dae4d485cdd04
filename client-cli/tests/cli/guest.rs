//! `mmuctl guest`: a guest that accepts, writes, converts and reads through both services.

use crate::common::Services;

#[test]
fn a_guest_converts_its_memory_and_user_space_follows() {
    let services = Services::start();
    services.ok("vm create");
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 64M");
    services.ok("convert --vm 1 --gpa 0 --size 64M --to private");
    services.ok("vm finalize --vm 1");
    let ran = services.ok(
        "guest --vm 1 accept:0x200000 write:0x200004=cafe read:0x200000+8 \
         map-gpa:0x800000200000+4M read:0x800000200000+8",
    );
    let results: Vec<&str> = ran["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| result["result"].as_str().unwrap())
        .collect();
    let expected = [
        "TDX_SUCCESS",
        "done",
        "00000000cafe0000",
        "TDX_SUCCESS",
        "0000000000000000",
    ];
    assert_eq!(results, expected);
    let reasons: Vec<&str> = ran["exits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|exit| exit["reason"].as_str().unwrap())
        .collect();
    assert_eq!(reasons, ["map_gpa", "map_gpa", "done"], "2 MiB at a time");
    assert_eq!(ran["pages_zapped"], 1);
    assert_eq!(services.ok("audit --vm 1")["mismatches"], 0);
}
