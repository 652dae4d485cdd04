//! Every RPC of both services has a rule, and docs/security.md says which.

use prost::Message as _;
use prost_types::FileDescriptorSet;
use transport::Rule;

const DOCUMENTED: &str = include_str!("../../../docs/security.md");
/// Rules by package.
const RULES: [(&str, &[Rule]); 2] = [
    ("kvm.mmu.v1", mmu_service::RULES),
    ("tdx.module.v1", tdx_module_svc::RULES),
];

fn rpcs_of(package: &str) -> Vec<String> {
    let descriptors = FileDescriptorSet::decode(mirror_proto::FILE_DESCRIPTOR_SET).unwrap();
    let files = descriptors.file.iter();
    let services = files
        .filter(|file| file.package() == package)
        .flat_map(|file| &file.service);
    let methods = services.flat_map(|service| {
        let name = service.name();
        let methods = service.method.iter();
        methods.map(move |method| format!("/{package}.{name}/{}", method.name()))
    });
    methods.collect()
}

#[test]
fn every_rpc_has_a_rule_and_every_rule_an_rpc() {
    for (package, rules) in RULES {
        let mut rpcs = rpcs_of(package);
        let mut ruled: Vec<_> = rules.iter().map(|(path, _)| (*path).to_owned()).collect();
        rpcs.sort_unstable();
        ruled.sort_unstable();
        assert!(!rpcs.is_empty(), "{package}");
        assert_eq!(ruled, rpcs);
        assert!(rules.iter().all(|(_, roles)| !roles.is_empty()));
    }
}

#[test]
fn the_rules_are_documented() {
    for (path, roles) in RULES.iter().flat_map(|(_, rules)| *rules) {
        let (service, method) = path[1..].rsplit_once('/').unwrap();
        let service = service.rsplit_once('.').unwrap().1;
        let words = if roles.is_all() {
            "any".to_owned()
        } else {
            roles.words().collect::<Vec<_>>().join(" or ")
        };
        let row = format!("| `{service}` | {method} | {words} |");
        assert!(DOCUMENTED.contains(&row), "{row}");
    }
}
