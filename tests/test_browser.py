"""Both pages as a person sees them, in Chromium: a stale partition is found, launched by clicks and fresh; two runs are compared."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from served_ui import runs, served, stale, wait_for
from toy_project import TARGETS, copied, replace_reference, run

pytestmark = pytest.mark.nightly
pytest.importorskip("selenium", reason="needs selenium, of the extra 'nightly'")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1500,1000")
SYNC = "from pathlib import Path; from pipelines.sync import sync; print(*sync(Path('.')))"
SECONDS = 120


class Page:
    """A browser with the few moves of this walk; every wait is for something to be seen."""

    def __init__(self, driver: webdriver.Chrome, pictures: Path) -> None:
        self.driver, self.pictures = driver, pictures

    def open(self, address: str) -> None:
        self.driver.get(address)

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def sees(self, *texts: str) -> str:
        """Wait until the page shows all of these; returns all that it shows."""
        WebDriverWait(self.driver, SECONDS, ignored_exceptions=[Exception]).until(
            lambda _: all(text in self.text() for text in texts), f"the page does not show {texts}")
        return self.text()

    def element(self, xpath: str) -> WebElement:
        """The first visible one, waited for."""
        return WebDriverWait(self.driver, SECONDS).until(
            lambda driver: next((e for e in driver.find_elements(By.XPATH, xpath) if e.is_displayed()), None), f"the page lacks {xpath}")

    def click(self, xpath: str) -> None:
        """Click it as soon as it can be clicked."""
        def clicked(_: object) -> bool:
            self.element(xpath).click()
            return True

        WebDriverWait(self.driver, SECONDS, ignored_exceptions=[Exception]).until(clicked, f"{xpath} cannot be clicked")

    def picture(self, name: str) -> None:
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))

    def hosts_asked(self) -> set[str]:
        """Hosts of all requests since the last call, by the browser's own record."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        addresses = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return {urlsplit(address).netloc for address in addresses if urlsplit(address).scheme in ("http", "https", "ws", "wss")}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """Debian's Chromium with a fresh profile."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    (tmp_path / "pictures").mkdir()
    try:
        yield Page(driver, tmp_path / "pictures")
    finally:
        driver.quit()


def partition_page(dagster: str, target: str) -> str:
    """Page of one target's reference set."""
    return f"{dagster}/assets/reference_set?view=partitions&partition={target}"


def test_a_stale_partition_is_found_launched_and_fresh(built_toy: Path, tmp_path: Path, page: Page) -> None:
    root = copied(built_toy, tmp_path)
    run(root, "-c", SYNC)
    replaced, untouched = TARGETS[:2]
    replace_reference(root, replaced)
    with served(root) as ui:
        page.open(f"{ui.dagster}/asset-groups")
        page.sees("Global asset lineage", "1_data", "6_results")
        page.picture("1-graph")
        assert stale(ui) == {f"reference_set@{replaced}"}, "what the page asks for"
        page.open(partition_page(ui.dagster, untouched))
        assert "Unsynced" not in page.sees("Materialized", "held_out")
        page.open(partition_page(ui.dagster, replaced))
        page.sees("Unsynced (1)")
        page.picture("2-stale")

        page.open(f"{ui.dagster}/locations/alignflow/jobs/build_target")
        page.click("//button[contains(., 'Materialize all')]")
        page.click("//*[text()='Select a partition or create one']")
        page.click(f"//*[@role='menuitem' or @role='option' or self::label or self::a][contains(., '{replaced}')]")
        page.picture("3-launch")
        page.click("//button[starts-with(., 'Launch')]")
        wait_for(lambda: list(runs(ui).values()) == ["SUCCESS"])
        page.open(f"{ui.dagster}/runs/{next(iter(runs(ui)))}")
        page.sees("Success", "metrics")
        page.picture("4-run")

        page.open(partition_page(ui.dagster, replaced))
        assert "Unsynced" not in page.sees("Materialized", "held_out")
        page.picture("5-fresh")
        assert stale(ui) == {"comparison", "report"}, "they read the metrics of all targets"
        assert page.hosts_asked() == {urlsplit(ui.dagster).netloc}


def test_two_targets_are_compared(built_toy: Path, tmp_path: Path, page: Page) -> None:
    root = copied(built_toy, tmp_path)
    run(root, "-c", SYNC)
    with served(root) as ui:
        page.open(ui.runs_page)
        page.sees(*(f"evaluate@{target}" for target in TARGETS[:2]))
        page.picture("6-runs")
        for target in TARGETS[:2]:
            page.click(f"//*[@role='row'][.//a[.='evaluate@{target}']]//div[contains(@class, 'ag-selection-checkbox')]")
        page.click("//button[.='Compare']")
        page.sees("Comparing 2 Runs", "dice_aligned", *(f"evaluate@{target}" for target in TARGETS[:2]))
        page.picture("7-compared")
        assert page.hosts_asked() == {urlsplit(ui.mlflow).netloc}
