//! `certs`: needs no service.

use serde_json::json;

use crate::args::CertsArgs;
use crate::certs;
use crate::error::Error;
use crate::output::Answer;

/// `mmuctl certs`.
pub(crate) fn run(args: &CertsArgs) -> Result<Answer, Error> {
    let files = certs::write(args).map_err(Error::Certs)?;
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    let text = if names.is_empty() {
        format!("{} has certificates already\n", args.dir.display())
    } else {
        format!("{}\n", names.join("\n"))
    };
    Ok(Answer::new(json!({ "files": names }), text))
}
