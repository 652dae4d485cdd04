//! The page in a real browser, over both real services.
//!
//! Screenshots go to `$PAGE_SCREENSHOTS`, or to a folder below the target directory.

use std::io::Write as _;
use std::path::PathBuf;

use mirror_proto::mmu::Mode;

use crate::driver::{Browser, Scheme, installed};
use crate::page::block_behind_the_mirror;
use crate::stack::{MIB, PAGE, SHARED, Stack};

/// Scripts that tests need often.
const HELPERS: &str = "
    window.cellsOf = (state) => Number(document.querySelector(`#legend [data-state=${state}]`)?.dataset.cells ?? 0);
    window.colourAt = (x, y) => {
      const canvas = document.getElementById('map'), ratio = canvas.width / canvas.clientWidth;
      return [...canvas.getContext('2d').getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3).join();
    };
    window.colourOf = (state) => {
      const probe = document.querySelector(`#legend .s-${state}`);
      return getComputedStyle(probe).backgroundColor.match(/\\d+/g).slice(0, 3).join();
    };
    window.text = (id) => document.getElementById(id).textContent;
    window.click = (id) => document.getElementById(id).click();
    window.fits = () => document.documentElement.scrollWidth <= window.innerWidth;
";

fn screenshot(name: &str) -> PathBuf {
    let folder = std::env::var_os("PAGE_SCREENSHOTS").map_or_else(
        || PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("page"),
        PathBuf::from,
    );
    std::fs::create_dir_all(&folder).unwrap();
    folder.join(format!("{name}.png"))
}

/// Says loudly why nothing was tested: past the test runner, which shows only what failing tests
/// print.
fn skipped() {
    let line = "!".repeat(78);
    let text = "SKIPPED: chromium or chromedriver is not installed, the page is not tested.\n         \
                On Debian: apt-get install chromium chromium-driver";
    let _ = writeln!(std::io::stderr(), "\n{line}\n{text}\n{line}");
}

async fn open(browser: &Browser, stack: &Stack, vm: u64, scheme: Scheme) {
    browser.prefer(scheme).await;
    // Another address first: one that differs by its fragment alone would not be loaded again.
    browser.open("about:blank").await;
    browser
        .open(&format!("http://{}/#vm={vm}", stack.authority()))
        .await;
    browser.run(HELPERS).await;
    browser
        .until("text('vm-title') !== '' && text('where').includes('cells')")
        .await;
}

/// Cells are square; the middle of one, as an expression.
fn middle(cell: u32) -> String {
    format!(
        "state.cellPx * ({cell} % state.columns + 0.5), state.cellPx * (Math.floor({cell} / state.columns) + 0.5)"
    )
}

#[tokio::test]
async fn the_page_shows_and_drives_a_vm_in_light_and_dark() {
    let Some(programs) = installed() else {
        return skipped();
    };
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 64 * MIB).await;
    stack.prefault(vm, 0, 2 * MIB).await.unwrap();
    stack.convert(vm, 4 * MIB, 2 * MIB, 0).await.unwrap();
    for page in 0..300 {
        stack
            .fault(vm, 0, 4 * MIB + page * PAGE + SHARED)
            .await
            .unwrap();
    }
    let other = stack.vm(Mode::Kernel, 1, 8 * MIB).await;
    let browser = Browser::start(programs).await;

    for (scheme, at) in [(Scheme::Light, 20_u32), (Scheme::Dark, 21)] {
        open(&browser, &stack, vm, scheme).await;
        let listed = browser.run("return text('vms')").await;
        let listed = listed.as_str().unwrap();
        assert!(
            listed.contains(&format!("VM {vm}")) && listed.contains(&format!("VM {other}")),
            "{listed}"
        );
        browser
            .until("cellsOf('private') >= 1 && cellsOf('shared') === 1 && cellsOf('free') >= 28")
            .await;
        for (cell, state) in [(0, "private"), (2, "shared"), (6, "free")] {
            browser
                .until(&format!(
                    "colourAt({}) === colourOf('{state}')",
                    middle(cell)
                ))
                .await;
        }
        let ground = browser
            .run("return getComputedStyle(document.documentElement).backgroundColor")
            .await;
        let is_dark = ground.as_str().unwrap().starts_with("rgb(1");
        assert_eq!(is_dark, scheme == Scheme::Dark, "{ground}");

        // Keys alone: to the cell, fault, and the map has one more.
        browser.run("window.before = cellsOf('private'); document.getElementById('map').focus(); return 0").await;
        browser.press("Home").await;
        for _ in 0..at {
            browser.press("ArrowRight").await;
        }
        let gpa = u64::from(at) * 2 * MIB;
        browser
            .until(&format!(
                "document.getElementById('gpa').value === '{gpa:#x}'"
            ))
            .await;
        browser.run("click('fault')").await;
        browser
            .until("text('result').includes('RET_PF_FIXED in the mirror root')")
            .await;
        browser
            .until("text('result').includes('TDH.MEM.PAGE.AUG → TDX_SUCCESS')")
            .await;
        browser.until("cellsOf('private') === before + 1").await;
        browser
            .until("text('cell').includes('1 of 512 pages private')")
            .await;
        browser
            .until("text('batches').includes('MEM.PAGE.AUG')")
            .await;
        assert_eq!(
            stack.stats(vm).await.pages_4k,
            512 + 300 + u64::from(at - 19)
        );

        // The two trees on the path.
        browser
            .until("document.querySelectorAll('#walk tbody tr').length === 4")
            .await;
        browser.until("[...document.querySelectorAll('#walk .mark')].every((mark) => mark.textContent === '=')").await;
        browser
            .until("text('walk').includes('PENDING') && text('walk').includes('leaf')")
            .await;
        browser.run("click('audit')").await;
        browser
            .until("text('result').includes('Audit: 0 mismatches')")
            .await;
        assert_eq!(
            browser.run("return fits()").await,
            true,
            "nothing hangs over"
        );
        browser
            .screenshot(&screenshot(&format!("vm-{}", scheme.name())))
            .await;
    }

    // Down to single pages, where the module is asked.
    browser
        .run("document.getElementById('map').focus(); return 0")
        .await;
    browser.press("Home").await;
    browser.press("Enter").await;
    browser
        .until("cellsOf('pending') === 512 && text('cell').includes('the module says PENDING')")
        .await;
    let info = stack.list().await.remove(0);
    block_behind_the_mirror(&stack, &format!("{:#x}", info.tdr), 0x3000).await;
    browser
        .until("cellsOf('blocked') === 1 && cellsOf('differs') === 1")
        .await;
    for _ in 0..3 {
        browser.press("ArrowRight").await;
    }
    browser
        .until("document.querySelector('#walk tr.differs').textContent.includes('PENDING_BLOCKED')")
        .await;
    browser.run("click('audit')").await;
    browser
        .until("text('result').includes('Audit: 1 mismatch ')")
        .await;
    browser.screenshot(&screenshot("differs-dark")).await;
    browser.press("Escape").await;
    browser
        .until("cellsOf('shared') === 1 && text('where').includes('cells of 2 MiB')")
        .await;

    // Refusals are shown, and say why.
    browser
        .run("document.getElementById('gpa').value = '0x40000000'; click('fault')")
        .await;
    browser
        .until("document.querySelector('.result.failed') && text('result').includes('fault: ')")
        .await;

    // A conversion empties the cell.
    browser.run("document.getElementById('gpa').value = '0x2800000'; document.getElementById('size').value = '0x200000'; click('to-shared')").await;
    browser
        .until("text('result').includes('converted to shared: 1 page zapped')")
        .await;
    browser
        .until(&format!("colourAt({}) === colourOf('free')", middle(20)))
        .await;

    for (name, width) in [("narrow", 360), ("middle", 900)] {
        browser.resize(width, 900).await;
        browser.until("fits()").await;
        browser.screenshot(&screenshot(name)).await;
    }
    let console = browser.console().await;
    let own: Vec<_> = console
        .iter()
        .filter(|line| line["level"] == "SEVERE")
        // The refusal above, which a browser reports as a request that failed.
        .filter(|line| !line["message"].as_str().unwrap_or_default().contains("409"))
        .collect();
    assert!(own.is_empty(), "{own:#?}");
}

#[tokio::test]
async fn a_vm_of_a_tebibyte_is_one_screen() {
    let Some(programs) = installed() else {
        return skipped();
    };
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 1 << 40).await;
    for (gib, mib) in [(0, 3 * 1024), (300, 700), (512, 260), (1023, 2)] {
        stack.prefault(vm, gib << 30, mib * MIB).await.unwrap();
    }
    let browser = Browser::start(programs).await;
    for scheme in [Scheme::Light, Scheme::Dark] {
        open(&browser, &stack, vm, scheme).await;
        browser
            .until("text('where').startsWith('2,048 cells of 512 MiB')")
            .await;
        browser
            .until("cellsOf('private') === 10 && cellsOf('free') === 2038")
            .await;
        browser
            .until("document.getElementById('map').clientHeight < window.innerHeight")
            .await;
        // Rows tell their addresses: an eighth of the memory is four rows of 32 GiB.
        browser
            .until("[...document.querySelectorAll('#rows li:not(.room)')].map((row) => row.textContent).join(' ').startsWith('0x0 0x2000000000 0x4000000000')")
            .await;
        browser
            .screenshot(&screenshot(&format!("tebibyte-{}", scheme.name())))
            .await;
    }
    // From all of it to one page in two steps.
    browser
        .run("document.getElementById('map').focus(); return 0")
        .await;
    browser.press("End").await;
    browser.press("ArrowLeft").await;
    browser.press("Enter").await;
    browser
        .until("text('where').startsWith('256 cells of 2 MiB: 0xffc0000000')")
        .await;
    browser.press("Enter").await;
    browser
        .until("text('where').startsWith('512 cells of 4 KiB') && cellsOf('pending') === 512")
        .await;
}
